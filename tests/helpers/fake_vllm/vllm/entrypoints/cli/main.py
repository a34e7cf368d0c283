"""`vllm serve`: the endpoints that TRL's client calls, with the development ones behind `VLLM_SERVER_DEV_MODE`.

One of its own: `/fake/log` says by which weights each call was answered.
"""

import argparse
import json
import os
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch

from ...engine.core import Core
from ..openai.protocol import choice, sampling_params

MOST_PROMPTS = int(os.environ.get("VLLM_MAX_COMPLETION_PROMPTS", "1024"))


class Problem(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Service:
    """What the endpoints do."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.core = Core(options.model, 0, options.max_model_len, options.logprobs_mode)
        self.sender: socket.socket | None = None
        self.is_packed = False
        self.is_updating = False

    def get(self, path: str, query: dict[str, list[str]]) -> Any:
        if path == "/health":
            return {}
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": self.options.model, "object": "model"}]}
        if path == "/fake/log":
            return {"generations": self.core.generations, "rows": self.core.rows}
        self._check_dev_mode()
        if path == "/get_world_size":
            return {"world_size": 1}
        if path == "/server_info":
            if query.get("config_format") != ["json"]:
                raise Problem(400, "only as JSON")
            transfer = self.options.weight_transfer_config
            config = {
                "model_config": {"logprobs_mode": self.options.logprobs_mode},
                "weight_transfer_config": None if transfer is None else json.loads(transfer),
            }
            return {"vllm_config": config, "vllm_env": {}, "system_env": {}}
        raise Problem(404, path)

    def post(self, path: str, body: Any) -> Any:
        if path == "/v1/completions":
            return self._completions(body)
        self._check_dev_mode()
        if path == "/init_weight_transfer_engine":
            return self._meet_trainer(body["init_info"])
        if path == "/start_weight_update":
            self.is_updating = True
            return {"message": "Weight update started"}
        if path == "/update_weights":
            return self._update(body["update_info"])
        if path == "/finish_weight_update":
            self.is_updating = False
            return {"message": "Weight update finished"}
        if path == "/reset_prefix_cache":
            return {"success": self.core.reset_prefix_cache()}
        raise Problem(404, path)

    def _check_dev_mode(self) -> None:
        if os.environ.get("VLLM_SERVER_DEV_MODE") != "1":
            raise Problem(404, "VLLM_SERVER_DEV_MODE is not 1")

    def _completions(self, body: dict[str, Any]) -> Any:
        if body["model"] != self.options.model:
            raise Problem(404, f"the model {body['model']} is not served")
        prompts = body["prompt"]
        if len(prompts) > MOST_PROMPTS:
            raise Problem(400, f"prompt list length {len(prompts)} exceeds {MOST_PROMPTS}")
        if self.is_updating:
            raise Problem(500, "in the middle of a weight update")
        params = sampling_params(body)
        outputs = self.core.generate(prompts, [params] * len(prompts))
        choices: list[dict[str, Any]] = []
        for output in outputs:
            for completion in output.outputs:
                number = len(choices)
                choices.append(choice(number, output.prompt_token_ids, completion, body))
        return {"object": "text_completion", "model": body["model"], "choices": choices}

    def _meet_trainer(self, info: dict[str, Any]) -> Any:
        if info["rank_offset"] != 1:
            raise Problem(400, "the trainer is rank 0")
        self.is_packed = info.get("packed", False)
        address = info["master_address"], info["master_port"]
        for _ in range(600):  # the trainer is on its way, too
            try:
                self.sender = socket.create_connection(address, timeout=60)
                break
            except ConnectionRefusedError:
                threading.Event().wait(0.05)
        return {"message": "Weight transfer initialized"}

    def _update(self, info: dict[str, Any]) -> Any:
        names, dtypes, shapes = info.pop("names"), info.pop("dtype_names"), info.pop("shapes")
        if info or not self.is_packed or not self.is_updating:
            raise Problem(400, f"weights are announced packed, between start and finish; {info}")
        for name, dtype_name, shape in zip(names, dtypes, shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype_name))
            received = self._receive(tensor.nbytes)
            tensor = torch.frombuffer(received, dtype=tensor.dtype).reshape(shape)
            self.core.load_weights([(name, tensor)])
        return {"message": "Weights updated"}

    def _receive(self, count: int) -> bytearray:
        assert self.sender is not None
        received = bytearray()
        while len(received) < count:
            part = self.sender.recv(count - len(received))
            if not part:
                raise Problem(500, "the trainer has gone")
            received += part
        return received


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: Service

    def do_GET(self) -> None:
        parts = urlparse(self.path)
        self._answer(lambda: self.service.get(parts.path, parse_qs(parts.query)))

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"null")
        self._answer(lambda: self.service.post(urlparse(self.path).path, body))

    def _answer(self, work: Any) -> None:
        status, content = 200, None
        try:
            # Weights are waited for while other requests are answered; generation is one at a time.
            content = work()
        except Problem as problem:
            status, content = problem.status, {"error": {"message": str(problem)}}
        except Exception as error:
            # 501: the client tries others again for half a minute.
            message = f"{type(error).__name__}: {error}"
            status, content = 501, {"error": {"message": message}}
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    serve = commands.add_parser("serve", allow_abbrev=False)
    serve.add_argument("model")
    serve.add_argument("--host", default="0.0.0.0")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--tensor-parallel-size", type=int, choices=[1], default=1)
    serve.add_argument("--data-parallel-size", type=int, choices=[1], default=1)
    serve.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    serve.add_argument("--dtype", default="auto")
    serve.add_argument("--kv-cache-dtype", default="auto")
    serve.add_argument("--model-impl", default="auto")
    serve.add_argument("--uvicorn-log-level", default="info")
    serve.add_argument("--max-model-len", type=int)
    serve.add_argument("--enable-scale-out", action="store_true")
    serve.add_argument("--weight-transfer-config")
    serve.add_argument("--logprobs-mode", default="raw_logprobs")
    serve.add_argument("--max-logprobs", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    Handler.service = Service(options)
    server = ThreadingHTTPServer((options.host, options.port), Handler)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
