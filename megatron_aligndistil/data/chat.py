"""Conversations as text and token ids, by the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from megatron_aligndistil.errors import ConfigError, DataError, reason
from megatron_aligndistil.types import Message

PROBE = "Zebra7"  # a response that no template alters
SHOWN_CHARACTERS, SHOWN_ROLES = 30, 8
REMEDY = "give another template in model.data.chat_template"


class ChatFormat:
    """What training, validation and generation share: how a prompt is written, and which token ends a response.

    A prompt is the template's rendering with its generation prompt; a response is what the template's rendering of the
    whole conversation adds to that, up to and including the end token. Defaults that a template inserts (a system
    prompt) are therefore the same in both. Templates with a thinking mode (Qwen3) are rendered in their direct mode.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; give a Jinja file in "
                "model.data.chat_template, such as the one of the model's instruct version"
            )
        self.tokenizer = tokenizer

    @cached_property
    def end(self) -> tuple[int, bool]:
        """The token that ends a response, and whether the template writes it.

        That is EOS where the template writes it, else the first special token that it writes after a response
        (a base model's EOS is often another one than its template's), else EOS, which is then to be appended.
        """
        rendered = self._render([{"role": "user", "content": PROBE[::-1]}, {"role": "assistant", "content": PROBE}])
        tail = self.tokenizer(rendered.rpartition(PROBE)[2], add_special_tokens=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        added = self.tokenizer.added_tokens_decoder
        special = [token for token in tail if token in added and added[token].special]
        if eos in tail:
            return eos, True
        if special:
            return special[0], True
        if eos is None:
            raise ConfigError(f"the tokenizer of {self.tokenizer.name_or_path} has no eos_token; set it in its config")
        return eos, False

    def prompt_text(self, messages: Iterable[Message]) -> str:
        """The rendering that a model continues with its response."""
        return self._render(list(messages), generation=True)

    def texts(self, messages: Iterable[Message], responses: Iterable[str]) -> tuple[str, list[str]]:
        """The prompt's rendering, and of each response the whole conversation's; each begins with the prompt's."""
        turns = list(messages)
        prompt = self.prompt_text(turns)
        whole = [self._render([*turns, {"role": "assistant", "content": response}]) for response in responses]
        if not all(text.startswith(prompt) for text in whole):
            raise DataError(f"the chat template writes a prompt otherwise with a response than without; {REMEDY}")
        return prompt, whole

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of rendered texts; templates write the special tokens themselves, so none is added."""
        if not texts:  # the tokenizer refuses an empty list
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _render(self, messages: list[Message], generation: bool = False) -> str:
        try:
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation, enable_thinking=False
            )
        except Exception as error:  # a template is a program: it may raise whatever Python does
            roles = ", ".join(turn["role"][:SHOWN_CHARACTERS] for turn in messages[:SHOWN_ROLES])
            raise DataError(
                f"the chat template fails on the roles {roles} ({reason(error)}); correct it or {REMEDY}"
            ) from None
        return str(text)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Iterable[Message]) -> list[int]:
    """Token ids of a prompt as training sees it, for generation to continue."""
    chat = ChatFormat(tokenizer)
    return chat.token_ids([chat.prompt_text(messages)])[0]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens at which generation stops: the one that ended responses in training, and EOS."""
    end, _ = ChatFormat(tokenizer).end
    return [end] if tokenizer.eos_token_id in (None, end) else [end, tokenizer.eos_token_id]
