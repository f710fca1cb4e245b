"""Tokenizers of local model folders, and what makes two of them the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_aligndistil.errors import ConfigError, DataError, reason

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(path: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a GGUF file (or a folder whose only tokenizer is in a GGUF file).

    ``chat_template`` is a Jinja file that replaces the tokenizer's own template (``model.data.chat_template``).
    """
    folder, gguf_file = _locate(Path(path).expanduser())
    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # a damaged file shows as any of Python's errors, and as bare ones of tokenizers
        raise DataError(f"{path}: tokenizer not loaded ({reason(error)}); copy it from the original model") from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            message = f"model.data.chat_template={chat_template}: not readable ({error}); give a Jinja file"
            raise ConfigError(message) from None
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what gives token ids their meaning: the vocabulary with added tokens, and the merges.

    Equal for a model and its fine-tunes, also where their special roles (which token is EOS) or chat templates differ.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = json.loads(backend.to_str())["model"].get("merges", []) if backend is not None else []
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    vocabulary = tokenizer.get_vocab()
    return _digest("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)), str(sorted(vocabulary.values())), *pairs)


def rendering_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that turns messages into token ids: whole tokenizer, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        whole = str(sorted(tokenizer.get_vocab().items()))
    else:
        backend.no_truncation()  # left over from an earlier call; every call of the tokenizer sets its own
        backend.no_padding()
        whole = backend.to_str()
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return _digest(whole, str(special), str(tokenizer.chat_template))


def _locate(path: Path) -> tuple[Path, str | None]:
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if not path.is_dir():
        raise DataError(f"{path}: no such model folder or GGUF file; correct the path of the model")
    if any((path / name).exists() for name in TOKENIZER_FILES):
        return path, None
    gguf_files = sorted(file.name for file in path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return path, gguf_files[0]
    raise DataError(f"{path}: holds no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the original model's files there")


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
