"""Language models that answer prompts, an OpenAI-compatible endpoint or a local one, and their answers on disk."""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import httpx
import openai
import torch
from accelerate import PartialState
from aiolimiter import AsyncLimiter
from transformers import AutoModelForCausalLM, AutoTokenizer

from nvembed.eval.files import whole


TIMED_OUT, REFUSED = "timed out", "refused (400)"  # no answers to keep: another run asks again


@dataclass(frozen=True)
class Answer:
    """One answer of the model.

    Args:
        text: None if there was none.
        finish: why it ended: "stop", "length" (cut off) or what the endpoint says.
        tokens_in, tokens_out: as the endpoint counts them; 0 if it does not.
    """

    text: str | None
    finish: str
    tokens_in: int = 0
    tokens_out: int = 0


class Writer(Protocol):
    """A language model that answers a prompt."""

    name: str
    options: dict  # that change the answers

    async def answer(self, prompt: str, seed: int) -> Answer: ...


class Endpoint:
    """An OpenAI-compatible chat endpoint; waits and asks again, as the `openai` client does, on 429, 5xx and time-outs.

    Args:
        counts: counts HTTP answers by status, and requests without an answer.
        requests_per_minute: of HTTP requests, also those of an answer that is asked for again; None: as many as
            `concurrency` allows.

    Raises:
        ConnectionError: from `answer`: the endpoint is down, refuses the key, the model or every prompt, or is no such
            endpoint.
    """

    REFUSALS = 10  # in a row, from the start, until it is taken for the endpoint's fault and not the prompts'

    def __init__(
        self,
        url: str,
        model: str,
        counts: Counter,
        requests_per_minute: float | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        max_tokens: int = 2048,
        temperature: float = 1.0,
    ):
        self.url, self.name, self.counts = url, model, counts
        self.options = {"max_tokens": max_tokens, "temperature": temperature}
        self.refused = 0
        limiter = None if requests_per_minute is None else AsyncLimiter(1, 60 / requests_per_minute)

        async def wait_for_turn(request: httpx.Request) -> None:
            if limiter is not None:
                await limiter.acquire()

        async def count(response: httpx.Response) -> None:
            counts[f"HTTP {response.status_code}"] += 1

        # Of the HTTP client, whose requests are also the ones that the openai client sends again by itself.
        hooks = {"request": [wait_for_turn], "response": [count]}
        self.client = openai.AsyncOpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=timeout,
            max_retries=retries,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks),
        )

    async def answer(self, prompt: str, seed: int) -> Answer:
        messages = [{"role": "user", "content": prompt}]
        try:
            response = await self.client.chat.completions.create(
                model=self.name, messages=messages, seed=seed, **self.options
            )
        except openai.APITimeoutError:
            self.counts["timed out"] += 1
            return Answer(None, TIMED_OUT)
        except openai.BadRequestError as error:  # of hosted endpoints often a filter of contents
            self.refused += 1
            if self.refused == self.REFUSALS and not self.counts["HTTP 200"]:
                raise ConnectionError(f"{self.url} refuses every prompt (400): {error.message}") from error
            return Answer(None, REFUSED)
        except openai.APIConnectionError as error:
            raise ConnectionError(
                f"{self.url} cannot be reached: {error.__cause__ or error}; is it running?"
            ) from error
        except openai.RateLimitError as error:
            raise ConnectionError(
                f"{self.url} still limits requests after {self.client.max_retries} tries (429): {error.message}; lower "
                "--requests_per_minute or --concurrency and run again"
            ) from error
        except openai.APIStatusError as error:
            raise ConnectionError(
                f"{self.url} answered {error.status_code} for {self.name!r}: {error.message}"
            ) from error
        except (openai.APIResponseValidationError, json.JSONDecodeError) as error:
            raise ConnectionError(f"{self.url} does not answer as an OpenAI-compatible endpoint: {error}") from error
        choices = getattr(response, "choices", None)
        if not choices:
            raise ConnectionError(
                f"{self.url} does not answer as an OpenAI-compatible endpoint: {str(response)[:80]!r}; end in /v1?"
            )
        # The client does not check the types of what it is given.
        text = getattr(getattr(choices[0], "message", None), "content", None)
        counted = (getattr(response.usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
        tokens = (number if isinstance(number, int) else 0 for number in counted)
        if text is not None and not isinstance(text, str):
            return Answer(None, "another thing than text", *tokens)
        return Answer(text, str(choices[0].finish_reason or "stop"), *tokens)


class LocalModel:
    """A chat model that transformers runs in this process, one prompt at a time.

    Raises:
        ValueError: there is no such model, or its tokenizer has no chat template.
    """

    def __init__(self, model: str, max_tokens: int = 2048, temperature: float = 1.0):
        self.name = model
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
        except OSError as error:
            raise ValueError(f"{model!r} is neither a local folder nor a model found on the Hub: {error}") from error
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{model!r} has no chat template: name a model that was tuned to follow instructions")
        self.model = AutoModelForCausalLM.from_pretrained(model, device_map=PartialState().device)
        self.options = {"max_new_tokens": max_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.options["temperature"] = temperature

    async def answer(self, prompt: str, seed: int) -> Answer:
        messages = [{"role": "user", "content": prompt}]
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        torch.manual_seed(seed)
        (made,) = self.model.generate(**inputs, **self.options)
        tokens_in = inputs["input_ids"].shape[1]
        ids = made[tokens_in:]
        is_cut_off = len(ids) == self.options["max_new_tokens"] and int(ids[-1]) != self.tokenizer.eos_token_id
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(text, "length" if is_cut_off else "stop", tokens_in, len(ids))


class Answers:
    """Answers on disk, one JSON object a line, written as they come; a line that a kill cut off is dropped.

    Raises:
        ValueError: a whole line is not an answer.
    """

    def __init__(self, path: Path):
        self.path, self.known = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.is_file() else b""
        complete = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                row = json.loads(line)
                key = row.pop("key")
                self.known[key] = Answer(**row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}:{number} is not an answer ({error!r}); remove the line") from None
        if len(complete) < len(content):
            with whole(path) as partial:
                partial.write_bytes(complete)
        self.file = path.open("ab")

    def add(self, key: str, answer: Answer) -> None:
        self.known[key] = answer
        if answer.finish in (TIMED_OUT, REFUSED):
            return
        self.file.write(json.dumps({"key": key} | asdict(answer)).encode() + b"\n")  # ASCII: half a character, too
        self.file.flush()
        os.fsync(self.file.fileno())
