"""Decoding with the constant-size state: read a prompt once, then one token at a time.

What is carried from token to token are the states of the blocks, whose size does not depend on how much was read. A long
prompt is read in pieces, so that it never stands in memory as a whole; of its logits only the last are computed. On a GPU a token's
step is one replay of a CUDA graph (`mmrec.decoding`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrec.core.memory import BlockState
from mmrec.decoding import Decoder
from mmrec.model import MMRecModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token, whatever the rest says.
        top_k: only the k most likely tokens; None: all.
        top_p: only the smallest set of most likely tokens whose probabilities sum to at least p, in (0, 1]; applied after `top_k`.
        seed: of the random generator; the same seed on the same device gives the same tokens.
        max_new_tokens: how many tokens at most.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; give a finite number of at least 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; give at least 1")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; give a number above 0 and up to 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")


def read_prompt(model: MMRecModel, token_ids: Sequence[int], chunk_size: int = 512) -> tuple[Tensor, list[BlockState]]:
    """Run a prompt of at least one token through the network.

    Args:
        model: a network; its planning projections are not read.
        token_ids: ids in [0, vocab_size).
        chunk_size: tokens run at a time; memory grows with it and not with the prompt.

    Returns:
        The logits of the token after the prompt, (1, vocab_size), and the state after the prompt.

    Raises:
        ValueError: for an empty prompt, an id out of range, a `chunk_size` below 1.
    """
    if not token_ids:
        raise ValueError("the prompt is empty; give at least one token")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; give at least 1")
    vocab_size = model.config.vocab_size
    if wrong := [token for token in token_ids if not 0 <= token < vocab_size]:
        raise ValueError(f"token id {wrong[0]} in the prompt is out of range: the network knows 0 … {vocab_size - 1}")
    device = model.embedding.weight.device
    state = model.init_state(1, device)
    # Not the model's forward: it would compute the logits of every token, and only the last one's are wanted.
    for start in range(0, len(token_ids), chunk_size):
        hidden, state = model.hidden_states(torch.tensor([token_ids[start : start + chunk_size]], device=device), state=state)
    return model.head(hidden[:, -1]), state


def filtered_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, vocab) over the temperature in fp32, with −inf for every token that `top_k` and `top_p` exclude.

    The most likely token always stays. Tokens as likely as the k-th stay too.
    """
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of the tokens more likely than this one
        excluded = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(excluded, float("-inf"))
    return logits


@torch.inference_mode()
def generate(
    model: MMRecModel, prompt_ids: Sequence[int], sampling: Sampling, *, stop_id: int | None = None, chunk_size: int = 512
) -> Iterator[int]:
    """Yield new token ids one by one until `stop_id` (which is not yielded) or `max_new_tokens`.

    Args:
        model: a network, put into evaluation mode by the caller.
        prompt_ids: ids of the text to continue; at least one.
        sampling: how tokens are chosen.
        stop_id: the end-of-document token; None: never stop early.
        chunk_size: see `read_prompt`.

    Raises:
        ValueError: see `read_prompt`.
    """
    logits, state = read_prompt(model, prompt_ids, chunk_size)
    generator = torch.Generator(device=logits.device).manual_seed(sampling.seed)
    decoder: Decoder | None = None
    try:
        for count in range(sampling.max_new_tokens):
            if sampling.temperature == 0.0:
                token = logits.argmax(-1)
            else:
                probabilities = filtered_logits(logits, sampling).softmax(-1)
                token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            value = int(token)
            if value == stop_id:
                return
            yield value
            if count + 1 == sampling.max_new_tokens:
                return
            if decoder is None:
                decoder = Decoder(model)
                decoder.load(state)
                state = []  # the decoder has its own
            logits = decoder.step(token)
    finally:
        if decoder is not None:
            decoder.close()
