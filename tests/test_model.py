"""The model as a whole."""

from tests.runs import changed_llama, micro, run


def test_a_projection_of_another_language_model_is_warned_of(world, tmp_path, capsys):
    llama = changed_llama(world, tmp_path, "norm.weight", 1.1)
    run(micro(world, tmp_path / "one", max_steps=1, llama=llama))
    assert "was trained with another" not in capsys.readouterr().err
    run(
        micro(
            world,
            tmp_path / "two",
            max_steps=1,
            proj=f"{tmp_path}/one/proj.safetensors",
        )
    )
    assert "proj.safetensors was trained with another llama" in capsys.readouterr().err
