"""Which errors of a run are its folder's."""

from __future__ import annotations

import errno

import pytest

from peftk.cli import output
from peftk.cli.errors import UserError


@pytest.mark.parametrize(
    ("error", "is_the_folders"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (PermissionError(errno.EACCES, "Permission denied", "{out}/loss.csv"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/somewhere/else"), False),
        (ConnectionError("refused"), False),
    ],
    ids=str,
)
def test_only_the_folders_errors_are_told_as_its_own(tmp_path, error, is_the_folders):
    out = tmp_path / "out"
    if error.filename:
        error.filename = error.filename.format(out=out)
    with pytest.raises(UserError if is_the_folders else type(error), match="--out" if is_the_folders else None) as found:
        with output.claimed(out, overwrite=False):
            (out / "kept").write_text("")
            raise error
    assert (found.value is error) is not is_the_folders
