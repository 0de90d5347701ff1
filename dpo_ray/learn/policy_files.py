"""The files of a policy on disk: are they complete, and which policy are they. No torch.

In: a local directory in Hugging Face layout. Out: a ConfigError, or a hash.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from dpo_ray.errors import ConfigError

WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_MODELS = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken", "vocab.txt", "tekken.json")
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
BESIDE_WEIGHTS = (
    *TOKENIZER_MODELS,
    *CHAT_TEMPLATES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "generation_config.json",
    "*.py",
)
"""Files, beside weights and config.json, that decide what a policy writes; as glob patterns."""


def check_policy_directory(path: str | Path) -> None:
    """Check that a local directory has what transformers and vLLM need, without loading it.

    Raises:
        ConfigError: naming the missing file and what to do.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"policy directory {path} does not exist on this machine; give an existing one or a hub id")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ConfigError(
            f"policy {path} is a PEFT adapter, and the reference needs the policy that it was tuned with; merge it into its "
            "base with merge_and_unload(), save that with save_pretrained and its tokenizer, and give its directory"
        )
    if not (path / "config.json").is_file():
        raise ConfigError(f"policy {path} has no config.json; save the model with model.save_pretrained({str(path)!r})")
    if not any(path.glob("*.safetensors")):
        pickled = sorted(p.name for p in path.glob("*.bin"))
        found = f"only pickled weights ({pickled[0]}), which can run code when opened" if pickled else "no weights"
        raise ConfigError(f"policy {path} has {found}; save it as .safetensors with model.save_pretrained")
    if (index := path / WEIGHTS_INDEX).is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(name for name in shards if not (path / name).is_file()):
            raise ConfigError(f"policy {path} lacks {missing[0]}, which {WEIGHTS_INDEX} names; copy it there again")
    if not any(any(path.glob(pattern)) for pattern in TOKENIZER_MODELS):
        raise ConfigError(f"policy {path} has no tokenizer ({TOKENIZER_MODELS[0]}); save it with tokenizer.save_pretrained")
    if not _has_chat_template(path):
        raise ConfigError(f"policy {path} has no chat template; put the one it was tuned with there as {CHAT_TEMPLATES[0]}")


def _has_chat_template(path: Path) -> bool:
    if any(any(path.glob(pattern)) for pattern in CHAT_TEMPLATES):
        return True
    tokenizer_config = path / "tokenizer_config.json"
    return tokenizer_config.is_file() and bool(json.loads(tokenizer_config.read_text()).get("chat_template"))


def policy_identity(directory: str | Path) -> str:
    """Return the sha256 of what decides a policy: weights, config, tokenizer, templates and code, by name and contents.

    It does not depend on where the directory is, on file times or on the order in which files are listed.
    """
    directory = Path(directory)
    patterns = ("*.safetensors", WEIGHTS_INDEX, "config.json", *BESIDE_WEIGHTS)
    names = {p.relative_to(directory).as_posix() for pattern in patterns for p in directory.glob(pattern)}
    return identity_of(file_hashes(directory, names))


def file_hashes(directory: str | Path, names: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of some files of a policy, by name."""
    hashes = {}
    for name in names:
        with open(Path(directory) / name, "rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def identity_of(hashes: dict[str, str]) -> str:
    """Return `policy_identity` of the policy whose files these are, whoever has hashed them."""
    return hashlib.sha256("".join(f"{name}\0{hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()
