"""The Python interface: ``from moss_jt import Moss``. Jittor starts when a model is loaded, not before."""

import reprlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from moss_jt.chat.chat import Chat
from moss_jt.chat.turn import MAX_ANSWER_TOKENS
from moss_jt.engine.causal_model import LoadedAdapter, Watcher
from moss_jt.engine.engine import Engine
from moss_jt.engine.generate import Generation
from moss_jt.engine.logprobs import Logprob, check_top, logprobs_of
from moss_jt.engine.prompt_lookup import make_drafter
from moss_jt.engine.sampling import REGULATION_START, SamplingParams
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.errors import MossError
from moss_jt.loading import Loaded, LoadSettings, load
from moss_jt.plan.drafting import token_share
from moss_jt.plan.placement import release
from moss_jt.plugins.interface import Plugin
from moss_jt.plugins.registry import PluginSettings
from moss_jt.store.locations import model_home
from moss_jt.store.tokenizer import BYTE_ORDER_MARK, IncrementalDecoder, Tokenizer
from moss_jt.train.adapter_bank import Given

END_TOKEN = "<eom>"
# What of beginnings is kept beside a model.
PROMPT_CACHE = "2GiB"
# Prompts of generate_many that the engine knows of at once.
MANY = 256


class Moss:
    """A loaded model. Close it, or use it in a ``with`` statement; its memory is free after that.

    ``generate``, ``logits`` and chats may run at once, in as many threads: one reading of the weights serves a token of each,
    and none depends on the others.

    name       of its folder
    config     the model's geometry
    tokenizer  text to ids and back
    plan       where the weights live
    load_s     seconds that loading took
    adapters   that answers may be written with, by their names
    notice     a sentence for the user about how it was loaded, or empty
    arrivals   the weights that stay, which are read while the first text is; None where all were read before
    """

    def __init__(self, loaded: Loaded) -> None:
        self.model = loaded.model
        self.config = loaded.model.config
        self.tokenizer = loaded.tokenizer
        self.plan = loaded.plan
        self.load_s = loaded.load_s
        self.name = loaded.name
        self.adapters = dict(loaded.adapters)
        self.copy = loaded.copy
        self.notice = loaded.notice
        self.arrivals = loaded.arrivals
        self._draft = loaded.draft
        # There the cache of what is idle goes when it has no room.
        self.engine = Engine(self.model, model_home() / "cache", self.copy, loaded.prompts)

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        device: str = "cpu",
        memory: str | int | None = None,
        gpu_memory: str | int | None = None,
        host_memory: str | int | None = None,
        context: int | None = None,
        draft: str | int = "auto",
        draft_model: str | Path = "auto",
        offload: str = "auto",
        parallel: int = 1,
        prompt_cache: str | int = PROMPT_CACHE,
        cache_bits: int = 16,
        adapters: Given | None = None,
    ) -> Self:
        """Load a model folder.

        On the CPU this returns while the weights that stay are still being read: the first text waits for them, and ``loaded``
        tells how far they are. What cannot be read then is an error of the text that needed it.

        Args:
            model: its path, or the name of a converted model, or "moss-tiny", which comes with the program; by default the
                one used last.
            device: "cpu" or "gpu"; "gpu:1" is the second card in CUDA's order among those that CUDA_VISIBLE_DEVICES shows,
                PyTorch's "cuda:1". A process keeps to the first that it loads for.
            memory: on the CPU, the most that this process may hold, as "8GiB", "80%" or bytes; what does not fit
                streams from disk. By default what is free, less a margin.
            gpu_memory: on the GPU, the same for the card's memory; what does not fit streams from the host's.
            host_memory: on the GPU, the same for the host's memory; what does not fit there either streams from disk.
            context: tokens that prompt and answer may have together; by default all that the model has.
            draft: "auto" (prompt lookup where weights stream), "lookup", "off", or the longest draft.
            draft_model: a copy of the model in fewer bits that writes ahead, for the model to verify in one pass: the name or
                path of its folder; "off" for none; by default, where that makes it quicker by the plan and ``draft`` is not "off",
                the one of fewest bits beside the model or among the converted that was made from the same checkpoint and fits.
            offload: "auto" or "stream": what does not fit streams. For comparison "swap", Jittor's own swapping, and on
                the GPU "unified", CUDA's managed memory.
            parallel: the cache has room for so many conversations of ``context`` tokens. More run at once while they are
                shorter, and who finds no room waits.
            prompt_cache: what was read of a chat's beginning is kept beside the model and not read again, in another process
                neither: so many bytes at most, as "2GiB"; those used longest ago go. 0 keeps none.
            cache_bits: 8 keeps keys and values as int8: about half the memory, and answers that differ a little (``moss-jt eval``
                tells how much). Drafts, streaming and others change nothing with it either.
            adapters: folders that ``moss-jt finetune`` or peft wrote, by names of your choice; or one or several folders, each
                perhaps as "NAME=FOLDER", otherwise called as it is. A text says with which it is read and continued,
                ``moss.generate(.., adapter=NAME)``; otherwise it is the model alone. Texts with different adapters share passes.

        Raises:
            MossError: there is no such model, its folder or an adapter's is damaged, the memory is too little for it, or
                something that a GPU needs is missing.
        """
        settings = LoadSettings(
            device=device,
            memory=memory,
            gpu_memory=gpu_memory,
            host_memory=host_memory,
            context=context,
            draft=draft,
            draft_model=draft_model,
            offload=offload,
            parallel=parallel,
            prompt_cache=prompt_cache,
            cache_bits=cache_bits,
            adapters=adapters,
        )
        return cls(load(model, settings))

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the configuration's, and MOSS's <eom>."""
        end = self.tokenizer.id(END_TOKEN)
        return frozenset({*self.config.eos_token_ids} | ({end} if end is not None else set()))

    def watch(self, watcher: Watcher | None) -> None:
        """Have a function called, block after block, in passes of several tokens; None ends that."""
        self.model.watcher = watcher

    @property
    def loaded(self) -> float:
        """The share of the weights that stay in memory that is there: reading the first text waits for them."""
        arrivals = self.arrivals
        return 1.0 if arrivals is None else 1 - arrivals.missing_bytes / max(1, arrivals.total_bytes)

    def session(self, background: bool = False, adapter: str | None = None) -> Text:
        """An empty conversation of tokens over this model.

        Args:
            background: others go first.
            adapter: the name of one that the model was loaded with; None for the model alone.

        Raises:
            MossError: there is no such adapter.
        """
        drafter = make_drafter(self._draft, self.plan.streams, token_share(self.plan))
        return Text(self.engine, drafter, background, self._adapter(adapter))

    def _adapter(self, name: str | None) -> LoadedAdapter | None:
        if name is None:
            return None
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise MossError(f"there is no adapter {name!r:.80}; the model was loaded with {known}.")
        return self.adapters[name]

    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> np.ndarray:
        """Logits (tokens, vocabulary) float32 of a text, every row predicting the token after it.

        Args:
            adapter: see :meth:`session`.

        Raises:
            MossError: the text is empty or longer than the context, an id is outside the vocabulary, or there is no such adapter.
        """
        token_ids = self._checked(token_ids)
        result = np.empty((len(token_ids), self.config.vocab_size), np.float32)
        text = self.session(adapter=adapter)
        text.extend(token_ids)
        for first, rows in text.logits():
            result[first : first + len(rows)] = rows
        return result

    def logprobs(self, token_ids: Sequence[int], top: int = 0, adapter: str | None = None) -> list[Logprob]:
        """How likely each token of a text but the first was after those before it, and ``top`` of the likeliest beside each.

        The model's own probabilities, as natural logarithms; in parts, so a long text needs no memory for all its logits.

        Raises:
            MossError: as :meth:`logits`.
        """
        check_top(top)
        token_ids = self._checked(token_ids)
        text = self.session(adapter=adapter)
        text.extend(token_ids)
        logprobs: list[Logprob] = []
        for first, rows in text.logits():
            following = token_ids[first + 1 : first + 1 + len(rows)]
            logprobs += logprobs_of(rows[: len(following)], following, top)
        return logprobs

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = SamplingParams.temperature,
        top_k: int = SamplingParams.top_k,
        top_p: float = SamplingParams.top_p,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        length_penalty: float = 1.0,
        regulation_start: int = REGULATION_START,
        max_time: float | None = None,
        logprobs: int | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Generation:
        """Continue a text.

        Args:
            prompt: text (special tokens in it count as such, a byte order mark before it does not), or token ids.
            max_new_tokens: the most tokens of the answer.
            temperature: 0 is greedy. For this and what follows see moss_jt.engine.sampling.SamplingParams.
            stop: a string, or several, that end the answer; they are not part of its text. None for none.
            max_time: seconds after which the answer ends; looked at after each token.
            logprobs: 0 or more: ``logprobs`` of the answer says how likely each token was, and so many of the likeliest beside it.
            adapter: the name of one that the model was loaded with; None for the model alone.
            sampling: presence_penalty, frequency_penalty, logit_bias, min_p.

        Returns:
            An iterator of pieces of text, with ``token_ids``, ``text``, ``logprobs`` and ``stats``.

        Raises:
            MossError: the prompt is empty or longer than the context, or an option's value is impossible.
        """
        params = SamplingParams(
            temperature,
            top_k,
            top_p,
            repetition_penalty,
            seed,
            length_penalty=length_penalty,
            regulation_start=regulation_start,
            **sampling,
        )
        limits = max_new_tokens, stop, max_time
        text = self.session(adapter=adapter)
        return self._answer(text, prompt, params, *limits, begin=False, logprobs=logprobs)

    def generate_many(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] | None = None,
        max_time: float | None = None,
        background: bool = True,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Iterator[Generation]:
        """Continue many texts at once: each reading of the weights serves a token of as many as the cache has room for.

        Args:
            prompts: as for :meth:`generate`; taken from the iterator as they are needed.
            background: other answers of this model go first.
            adapter: as for :meth:`generate`, for all of them.
            sampling: temperature and so on, as for :meth:`generate`; every answer is what it is alone, with this seed.

        Yields:
            The finished answers, in the order of their prompts.

        Raises:
            MossError: a prompt is empty or longer than the context, or an option's value is impossible.
        """
        if isinstance(prompts, str):
            raise MossError("generate_many takes a list of prompts; for a single one, call generate.")
        params = SamplingParams(**sampling)
        answers: deque[Generation] = deque()
        try:
            for prompt in prompts:
                text = self.session(background, adapter)
                answers.append(self._answer(text, prompt, params, max_new_tokens, stop, max_time, begin=True))
                while len(answers) >= MANY:
                    yield answers.popleft().finish()
            while answers:
                yield answers.popleft().finish()
        finally:
            for answer in answers:
                answer.close()

    def begin(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        max_new_tokens: int,
        stop: str | Sequence[str] | None = None,
        max_time: float | None = None,
        *,
        background: bool = True,
        logprobs: int | None = None,
        adapter: str | None = None,
    ) -> Generation:
        """An answer that is written from now on, to its end, whether or not its pieces are asked for.

        Args:
            background: other answers of this model go first.
            logprobs, adapter: see :meth:`generate`.

        Raises:
            MossError: as :meth:`generate`.
        """
        limits = max_new_tokens, stop, max_time
        text = self.session(background, adapter)
        return self._answer(text, prompt, params, *limits, begin=True, logprobs=logprobs)

    def _answer(
        self,
        text: Text,
        prompt: str | Sequence[int],
        params: SamplingParams,
        max_new_tokens: int,
        stop: str | Sequence[str] | None,
        max_time: float | None,
        begin: bool,
        logprobs: int | None = None,
    ) -> Generation:
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt.removeprefix(BYTE_ORDER_MARK))
        text.extend(self._checked(prompt))
        stops = [stop] if isinstance(stop, str) else stop or ()
        decoder = IncrementalDecoder(self.tokenizer)
        limits = max_new_tokens, self.stop_ids, stops, self.load_s, max_time
        if any(token >= self.config.vocab_size for token in params.biases):
            raise MossError(
                f"logit_bias names a token that does not exist; ids are 0 to {self.config.vocab_size - 1}."
            )
        ahead = IncrementalDecoder(self.tokenizer) if begin and stops else None
        return Generation(text, decoder, params, *limits, begin=begin, logprobs=logprobs, ahead=ahead)

    def _checked(self, given: Sequence[int]) -> list[int]:
        """The token ids, from a list or an array."""
        try:
            if isinstance(given, str | bytes):
                raise TypeError
            token_ids = [index(token) for token in given]
        except TypeError:
            raise MossError(
                "what is to be read must be one text, or token ids as a list of whole numbers, as moss.tokenizer.encode gives "
                f"them; it is {reprlib.repr(given)}."
            ) from None
        if not token_ids:
            raise MossError("the prompt is empty: there is no text to continue.")
        if len(token_ids) > self.model.capacity:
            raise MossError(
                f"the prompt has {len(token_ids)} tokens, and the context has room for {self.model.capacity}. "
                f"Shorten it, or load with a larger context (this model: {self.config.n_positions} at most)."
            )
        if not all(0 <= token < self.config.vocab_size for token in token_ids):
            raise MossError(f"token ids must be from 0 to {self.config.vocab_size - 1}.")
        return token_ids

    def chat(
        self,
        plugins: Iterable[str | Plugin] = (),
        *,
        settings: PluginSettings | None = None,
        system: str | None = None,
        max_new_tokens: int = MAX_ANSWER_TOKENS,
        temperature: float = SamplingParams.temperature,
        top_k: int = SamplingParams.top_k,
        top_p: float = SamplingParams.top_p,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        adapter: str | None = None,
    ) -> Chat:
        """A conversation in MOSS's format: ``for event in moss.chat().send("..."): ...``.

        Args:
            plugins: what MOSS may call: names ("calculator", "solver", "search", "image", an installed one's, or
                "./my_plugin.py:Class"), or objects of your own (moss_jt.Plugin).
            settings: where plugins find what they need.
            system: a meta instruction of your own, instead of what MOSS was trained to be told about itself.
            max_new_tokens: the most tokens of an answer.
            temperature: 0 is greedy. For this and what follows see moss_jt.engine.sampling.SamplingParams.
            adapter: the name of one that the model was loaded with; None for the model alone.

        Raises:
            MossError: the model is no MOSS, there is no such plugin, an option's value is impossible, or the context has
                no room for the meta instruction and a turn.
        """
        return Chat(
            self if adapter is None else _Adapted(self, adapter),
            plugins,
            settings=settings,
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )

    def __repr__(self) -> str:
        return f"<Moss {self.name}: {self.plan}>"

    def close(self) -> None:
        """Let go of weights and cache. Closing twice is no fault; using the model after it is one."""
        self.engine.close()
        if self.copy is not None:
            self.copy.close()
        self.model.close()
        release(self.plan)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Adapted:
    """A model whose conversations have an adapter: moss_jt.chat.chat.ChatModel."""

    moss: Moss
    adapter: str

    @property
    def tokenizer(self) -> Tokenizer:
        return self.moss.tokenizer

    def session(self) -> Text:
        return self.moss.session(adapter=self.adapter)

    def watch(self, watcher: Watcher | None) -> None:
        self.moss.watch(watcher)

    @property
    def loaded(self) -> float:
        return self.moss.loaded
