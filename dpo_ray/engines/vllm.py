"""One vLLM engine inside a Ray actor, fed by many calls at once.

A thread of its own steps the engine. Calls of `generate` hand it their requests and wait, so parts that overlap share
the running batch (continuous batching), and the tail of one part does not idle the engine. The weights are those it was
started with: after vLLM's reload in place, on CPU, samples came from a mix of the old weights and the new.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from dpo_ray.engines.policies import PolicyRef, local_path
from dpo_ray.engines.requests import EngineSettings, Request, Sample


class VllmEngine:
    """Holds one vLLM engine. In a Ray actor with as many threads as there are calls in flight."""

    def __init__(self, settings: EngineSettings, policy: PolicyRef) -> None:
        _set_environment(settings)
        # The one import that is not at the top: vLLM reads its environment when it is imported.
        from vllm import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments: dict[str, Any] = {
            "max_model_len": settings.max_model_len,
            "dtype": settings.dtype,
            "tensor_parallel_size": settings.tensor_parallel,
            "seed": 0,
            "disable_log_stats": True,
            "load_format": "safetensors",
            # Every request states each sampling parameter; the model's generation_config.json must change none.
            "generation_config": "vllm",
        }
        if settings.tensor_parallel > 1:
            arguments["distributed_executor_backend"] = "mp"  # one node, no placement group of its own
        if settings.gpus == 0:
            arguments["enforce_eager"] = True
            # A prompt prefilled in several steps rewinds its seeded generator, which torch's CPU generator cannot do.
            arguments["enable_chunked_prefill"] = False
        arguments |= dict(settings.engine_args)
        self.settings = settings
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=local_path(policy),
                revision=policy.revision,
                trust_remote_code=policy.trust_remote_code,
                **arguments,
            ),
            # vLLM's batch limits for offline work: twice to eight times as many sequences at a time as without it.
            usage_context=UsageContext.LLM_CLASS,
        )
        self.calls: deque[_Call] = deque()
        self.wake = threading.Condition()
        self.turn = threading.Lock()
        self.failure: BaseException | None = None
        threading.Thread(target=self._step_forever, daemon=True, name="vllm-step").start()

    def load(self) -> int:
        """Number of calls that wait or run; the pool sends the next part where it is least."""
        return len(self.calls)

    def generate(self, requests: Sequence[Request], sampling: Mapping[str, Any]) -> list[list[Sample]]:
        """Sample completions, n of each request, in the order of `requests`."""
        call = _Call(requests, sampling)
        if self.settings.closed:
            with self.turn:
                return self._submit(call).result()
        return self._submit(call).result()

    def _submit(self, call: _Call) -> Future[list[list[Sample]]]:
        with self.wake:
            if self.failure:
                raise RuntimeError(f"this engine died: {self.failure}")
            self.calls.append(call)
            self.wake.notify()
        return call.future

    def _step_forever(self) -> None:
        running: dict[str, tuple[_Call, int]] = {}
        number = 0
        try:
            while True:
                with self.wake:
                    while not self.calls:
                        self.wake.wait()
                    waiting = [c for c in self.calls if not c.started]
                for call in waiting:
                    if self.settings.closed:
                        self.engine.reset_prefix_cache()
                    call.started = True
                    for index, request in enumerate(call.requests):
                        number += 1
                        running[str(number)] = (call, index)
                        self._add(str(number), request, call.sampling)
                if not running:
                    self._retire()
                    continue
                output: Any
                for output in self.engine.step():
                    if output.finished:
                        call, index = running.pop(output.request_id)
                        call.finish(index, [_sample(o) for o in output.outputs])
                self._retire()
        except BaseException as error:
            with self.wake:
                self.failure = error
                for call in self.calls:
                    call.future.set_exception(error)
                self.calls.clear()

    def _retire(self) -> None:
        with self.wake:
            for call in [c for c in self.calls if c.started and c.unfinished == 0]:
                self.calls.remove(call)
                call.future.set_result(call.samples)

    def _add(self, request_id: str, request: Request, sampling: Mapping[str, Any]) -> None:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        want_logps = sampling["logps"]
        parameters = SamplingParams(
            n=request.n,
            seed=request.seed,
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            top_k=sampling["top_k"],
            min_p=sampling["min_p"],
            repetition_penalty=sampling["repetition_penalty"],
            presence_penalty=sampling["presence_penalty"],
            frequency_penalty=sampling["frequency_penalty"],
            max_tokens=min(sampling["max_new_tokens"], self.settings.max_model_len - len(request.prompt_token_ids)),
            stop=list(sampling["stop"]),
            stop_token_ids=list(sampling["stop_token_ids"]),
            logprobs=0 if want_logps else None,
            flat_logprobs=want_logps,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.engine.add_request(request_id, TokensPrompt(prompt_token_ids=request.prompt_token_ids), parameters)


class _Call:
    """One `generate` call under way."""

    def __init__(self, requests: Sequence[Request], sampling: Mapping[str, Any]) -> None:
        self.requests, self.sampling = requests, sampling
        self.samples: list[list[Sample]] = [[] for _ in requests]
        self.unfinished = len(requests)
        self.started = False
        self.future: Future[list[list[Sample]]] = Future()

    def finish(self, index: int, samples: list[Sample]) -> None:
        self.samples[index] = samples
        self.unfinished -= 1


def _sample(output: Any) -> Sample:
    logps = None if output.cumulative_logprob is None else float(output.cumulative_logprob)
    return Sample(list(output.token_ids), output.text, output.finish_reason, logps)


def _set_environment(settings: EngineSettings) -> None:
    """Environment that vLLM reads at import; only inside the engine's own process."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if settings.gpus == 0:
        # In this process: no child to start or to lose, and half the start time.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # Ray sets as many threads as the actor's CPUs; vLLM's CPU attention aborts when there are fewer cores than that.
        os.environ["OMP_NUM_THREADS"] = str(min(max(1, int(settings.cpus)), len(os.sched_getaffinity(0))))
        if settings.engine_args.get("enforce_eager", True):
            # vLLM compiles a few helpers even when eager (the ranks of log-probabilities), which wants a C++ compiler.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
