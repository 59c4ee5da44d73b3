"""Files that are written."""

import pytest

from plumbing.console import InputError
from plumbing.files import append_row


def test_a_full_disk_is_named_with_the_file():
    with (
        pytest.raises(InputError, match="/dev/full: cannot be written"),
        open("/dev/full", "w") as file,
    ):
        append_row(file, step=1)
