"""transformers' list of names, made once: the same list, half the files."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import sys
opened = [0]
sys.addaudithook(lambda event, given: opened.__setitem__(0, opened[0] + (event == "open" and "/models/" in str(given[0]))))
from transformers.utils import import_utils
theirs = import_utils.define_import_structure
from hpc_hess.model.sources.listing import list_once
list_once()
once = opened[0]
import transformers
assert transformers.AutoModelForCausalLM.__name__ == "AutoModelForCausalLM"
assert opened[0] - once < once / 4, (opened[0], once)  # auto classes, no list
import transformers.models
assert import_utils.define_import_structure(transformers.models.__file__) == theirs(transformers.models.__file__)
assert "llama.modeling_llama" in theirs(transformers.models.__file__)[frozenset({"torch"})]
assert transformers.models.llama.LlamaConfig is transformers.LlamaConfig
"""


def test_the_second_list_is_that_of_transformers_and_costs_no_files() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
