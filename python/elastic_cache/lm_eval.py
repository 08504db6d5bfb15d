"""A loaded model as a model of EleutherAI's lm-evaluation-harness.

    python -m elastic_cache.lm_eval --model elastic_cache --model_args model=DIR --tasks gsm8k

The harness looks for models in its own package and has no entry point for others, so this module
registers the class and then hands over to the harness's command line. From Python, importing it
is enough: `lm_eval.simple_evaluate(model="elastic_cache", ...)` finds the model afterwards.

`model_args` takes this package's names and those of `llada_dist`, see `lm_eval_args.py`. Nothing
else in the package imports this module, so the harness stays optional.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from elastic_cache.config import GenerationConfig
from elastic_cache.device import find_device
from elastic_cache.engine import load
from elastic_cache.lm_eval_args import read_arguments, request_settings, stop_strings
from elastic_cache.models.tokenizer import Tokenizer
from elastic_cache.types import Generation, Message

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import simple_parse_args_string
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    # As a command it ends with the sentence alone, without a traceback.
    raise (SystemExit if __name__ == "__main__" else ModuleNotFoundError)(
        "elastic_cache.lm_eval needs the lm-evaluation-harness, which is not installed: "
        "run pip install lm_eval"
    ) from None

_LOGGER = logging.getLogger("elastic_cache.lm_eval")

_NO_LIKELIHOOD = (
    "a masked-diffusion model has no exact likelihood of a text, so tasks that compare likelihoods "
    "(multiple choice, perplexity) cannot be run: use generation tasks"
)

_HARNESS_DEVICE = "cuda:0"
"""What the harness's command line passes on when --device is not given."""


@register_model("elastic_cache", "llada_dist")
class ElasticCacheLM(LM):
    """Answers the harness's generation requests, one at a time.

    A request's text is tokenised as it is. It becomes a chat only with the harness's
    --apply_chat_template, also for instruct models.

    Attributes:
        engine: the loaded model, as `elastic_cache.load` returns it.
        arguments: what `model_args` said.
    """

    def __init__(self, **model_args: Any) -> None:
        """Loads the model; see `read_arguments` for the arguments.

        Raises:
            ValueError: an argument or the checkpoint is wrong, in a sentence.
        """
        super().__init__()
        arguments = read_arguments(model_args)
        self.arguments = arguments
        device = find_device(arguments.device) if arguments.device else _usable_device()
        dtype = arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16")
        self.engine = load(arguments.model, str(device), dtype)
        model = self.engine.model
        if model.tokenizer is None:
            raise ValueError(f"{model.name!r} has no tokenizer.json: the harness works with texts")
        self._tokenizer: Tokenizer = model.tokenizer
        if arguments.mask_id not in (None, model.config.mask_id):
            raise ValueError(
                f"mask_id is {arguments.mask_id}, but {model.name!r} was trained with "
                f"{model.config.mask_id}: leave mask_id out"
            )
        self._max_length = model.config.max_length
        if arguments.max_length is not None:
            self._max_length = _checked_length(arguments.max_length, self._max_length)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> ElasticCacheLM:
        """As `create_from_arg_obj`, from "name=value,name=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> ElasticCacheLM:
        """Makes the model from `model_args` and from what the harness's own options say.

        `model_args` comes first where both name a device or a batch size.
        """
        options = {k: v for k, v in (additional_config or {}).items() if v is not None}
        if options.get("device") == _HARNESS_DEVICE:
            del options["device"]
        return cls(**{**options, **arg_dict})

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.engine.model.device

    @property
    def tokenizer_name(self) -> str:
        """Tells the harness's request caches of different checkpoints apart."""
        return self.engine.model.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """A chat of one message, for the harness's records; "" where no template is applied."""
        if isinstance(chat_template, str):
            raise ValueError(
                f"--apply_chat_template takes no name here, got {chat_template!r}: a checkpoint "
                "has one chat template"
            )
        message: Message = {"role": "user", "content": "{content}"}
        return self._tokenizer.render_chat([message]) if chat_template else ""

    def apply_chat_template(
        self, chat_history: Sequence[Message], add_generation_prompt: bool = True
    ) -> str:
        """The checkpoint's chat as text.

        Args:
            chat_history: messages, the system's, few-shot examples and the question.
            add_generation_prompt: False means that the last message is the beginning of the
                answer, which the model is to continue.
        """
        if add_generation_prompt:
            return self._tokenizer.render_chat(chat_history)
        *before, start = chat_history
        return self._tokenizer.render_chat(before) + start["content"]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers each request, its text cut at the first of its stop strings.

        Args:
            requests: their `args` are (text, generation_kwargs).
            disable_tqdm: no progress bar.

        Raises:
            ValueError: a request asks for what is not implemented, in a sentence.
        """
        texts: list[str] = []
        answers: list[Generation] = []
        seen: Counter[str] = Counter()
        progress = tqdm(requests, desc="Running generate_until requests", disable=disable_tqdm)
        for request in progress:
            context, asked = request.args
            settings = request_settings(self.arguments.settings, asked)
            if settings.get("seed") is not None:
                # A task that repeats a request wants different samples of it.
                settings["seed"] += seen[context]
            seen[context] += 1
            ids = self._encode(context, GenerationConfig(**settings).gen_length)
            answer = self.engine.generate(ids, **settings)
            answers.append(answer)
            generated = answer.ids[len(ids) : len(ids) + answer.num_tokens].tolist()
            texts.append(text_until(self._tokenizer, generated, stop_strings(asked)))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        if self.arguments.show_speed and answers:
            print(self._speed(answers))
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(_NO_LIKELIHOOD)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError(_NO_LIKELIHOOD)

    def _encode(self, text: str, gen_length: int) -> list[int]:
        """Token ids of a prompt; of one that is too long the end, as in the harness's models."""
        ids = self._tokenizer.encode(text)
        if self.engine.model.config.mask_id in ids:
            raise ValueError("a request contains the mask token as text, which would be filled in")
        room = self._max_length - gen_length
        if room < 1:
            raise ValueError(
                f"gen_length {gen_length} leaves no room for a prompt in {self._max_length} tokens"
            )
        if len(ids) > room:
            _LOGGER.warning("a prompt of %d tokens is cut to its last %d", len(ids), room)
        return ids[-room:]

    def _speed(self, answers: Sequence[Generation]) -> str:
        tokens, forwards = sum(a.num_tokens for a in answers), sum(a.nfe for a in answers)
        seconds = sum(a.seconds for a in answers)
        model = self.engine.model
        device = "cpu" if model.device.type == "cpu" else torch.cuda.get_device_name(model.device)
        return (
            f"{len(answers)} answers, {tokens} tokens up to the first EOS in {seconds:.1f} s: "
            f"{tokens / seconds:.1f} tokens/s, {tokens / forwards:.2f} tokens per forward (TPF), "
            f"{forwards} forwards (NFE); batch size 1, {device}, warm-up included"
        )


def text_until(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> str:
    """Text of an answer, without special tokens, up to the first of the stop strings.

    A stop string can be a special token ("<|eot_id|>"), which the text no longer shows.
    """
    for stop in stops:
        encoded = tokenizer.encode(stop)
        if len(encoded) == 1 and not tokenizer.decode(encoded) and encoded[0] in ids:
            ids = ids[: ids.index(encoded[0])]
    text = tokenizer.decode(ids)
    return min((text.split(stop, 1)[0] for stop in stops), key=len, default=text)


def _checked_length(given: object, most: int) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= most:
        raise ValueError(f"max_length must be between 1 and the model's {most}, got {given!r}")
    return given


def _usable_device() -> torch.device:
    try:
        return find_device("cuda")
    except ValueError as reason:
        _LOGGER.warning("no device was given, so this runs on the CPU: %s", reason)
        return torch.device("cpu")


if __name__ == "__main__":
    cli_evaluate()
