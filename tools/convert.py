"""Official weight files -> the safetensors files that the program reads, and back.

    python tools/convert.py vision eva_vit_g.pth weights/eva_vit_g.safetensors [--n_heads=16] [--n_layers=39]
    python tools/convert.py qformer blip2_pretrained_flant5xxl.pth weights/qformer.safetensors [--n_heads=12]
    python tools/convert.py proj prerained_minigpt4_7b.pth out/official/proj.safetensors
    python tools/convert.py export out/stage2 mine.pth
"""

import re

# The original's tensor names -> ours, first match wins; None: dropped on purpose. A name that no row matches
# is an error.
NAMES = (
    (r"visual_encoder\.", "vision."),
    (r"ln_vision\.", "ln_vision."),
    (r"query_tokens$", "qformer.query_tokens"),
    (r"Qformer\.bert\.embeddings\.position_ids$", None),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.norm."),
    (r"Qformer\.bert\.encoder\.layer\.(\d+)\.attention\.self\.", r"qformer.layers.\1.self_attn."),
    (r"Qformer\.bert\.encoder\.layer\.(\d+)\.attention\.output\.dense\.",
     r"qformer.layers.\1.self_attn.out."),
    (r"Qformer\.bert\.encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.",
     r"qformer.layers.\1.self_attn.norm."),
    (r"Qformer\.bert\.encoder\.layer\.(\d+)\.crossattention\.self\.", r"qformer.layers.\1.cross_attn."),
    (r"Qformer\.bert\.encoder\.layer\.(\d+)\.crossattention\.output\.dense\.",
     r"qformer.layers.\1.cross_attn.out."),
    (r"Qformer\.bert\.encoder\.layer\.(\d+)\.crossattention\.output\.LayerNorm\.",
     r"qformer.layers.\1.cross_attn.norm."),
    (r"Qformer\.bert\.encoder\.layer\.(\d+)\.intermediate_query\.dense\.", r"qformer.layers.\1.fc1."),
    (r"Qformer\.bert\.encoder\.layer\.(\d+)\.output_query\.dense\.", r"qformer.layers.\1.fc2."),
    (r"Qformer\.bert\.encoder\.layer\.(\d+)\.output_query\.LayerNorm\.", r"qformer.layers.\1.norm."),
    (r"llama_proj\.", "proj."),
    (r"llama_model\..*rotary_emb\.inv_freq$", None),
    (r"llama_model\.lm_head\.", "llama.lm_head."),
    (r"llama_model\.model\.", "llama."),
)


def rename(name: str) -> str | None:
    """The original's name of a tensor -> ours in MiniGPT4, None for one to drop. KeyError if unknown."""
    for pattern, ours in NAMES:
        if match := re.match(pattern, name):
            return None if ours is None else match.expand(ours) + name[match.end():]
    raise KeyError(name)
