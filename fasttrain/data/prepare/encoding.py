"""Encoding in several processes, in order, so that their number changes nothing but the time.

A worker is `python -c "…serve()"` with frames of numbers and UTF-8 on its standard input and
output: it imports no more than the tokenizer needs, does not run the caller's main module again (a
script that calls `prepare` needs no guard), and ends by itself when this process is gone, however
it went.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from fasttrain.data.files import DataError
from fasttrain.data.prepare.splitting import Piece
from fasttrain.data.tokenizer import Encoder, OtherIdsError, load_tokenizer

__all__ = ["Batch", "encoded", "serve"]

Ids = list[NDArray[np.unsignedinteger[Any]]]
# The first number of an answer: 0 for ids, or which error.
_ERRORS: dict[int, type[Exception]] = {1: OtherIdsError, 2: DataError}
_WORKER = "from fasttrain.data.encoding import serve; serve()"


Batch = tuple[list[Piece], int]  # encoded together; how many bytes of the input were read by then


def encoded(
    batches: Iterator[Batch], encoder: Encoder, tokenizer_file: Path, workers: int
) -> Generator[tuple[Batch, Ids]]:
    """Each batch with the ids of its pieces, in the order of the batches.

    Args:
        batches: Read ahead by as many as there are workers, and two.
        encoder: Used here if `workers` is 1, and its like in each worker.
        tokenizer_file: Its tokenizer.
        workers: Processes that encode.

    Raises:
        OtherIdsError: tiktoken cannot be used on this text.
        DataError: The tokenizer cannot encode it.
        ChildProcessError: A worker process was ended from outside.
    """
    if workers == 1:
        for batch in batches:
            yield batch, encoder.encode([piece.text for piece in batch[0]])
        return
    how = "tokenizers" if encoder.not_fast else "tiktoken"
    processes = [_Worker(tokenizer_file, how) for _ in range(workers)]
    free = SimpleQueue[_Worker]()
    for process in processes:
        free.put(process)

    def encode(pieces: Sequence[Piece]) -> Ids:
        process = free.get()
        try:
            return process.encode([piece.text for piece in pieces])
        finally:
            free.put(process)

    threads = ThreadPoolExecutor(workers)
    ahead: deque[tuple[Batch, Future[Ids]]] = deque()
    try:
        for batch in batches:
            ahead.append((batch, threads.submit(encode, batch[0])))
            if len(ahead) > workers + 2:
                done, future = ahead.popleft()
                yield done, future.result()
        while ahead:
            done, future = ahead.popleft()
            yield done, future.result()
    finally:
        for process in processes:
            process.end()
        threads.shutdown(cancel_futures=True)


class _Worker:
    """A process that encodes what it is sent."""

    def __init__(self, tokenizer_file: Path, how: str) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(tokenizer_file), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # The processes are the parallelism; `tokenizers` would add a thread for each core.
            env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        )
        self._to = cast(IO[bytes], self._process.stdin)
        self._from = cast(IO[bytes], self._process.stdout)

    def encode(self, texts: Sequence[str]) -> Ids:
        try:
            _send_texts(self._to, texts)
            status, n_texts = _numbers(self._from, 2).tolist()
            sizes = _numbers(self._from, n_texts)
            if status in _ERRORS:
                raise _ERRORS[status](_exactly(self._from, int(sizes[0])).decode())
            ids = np.frombuffer(_exactly(self._from, 4 * int(sizes.sum())), np.uint32)
        except (EOFError, OSError) as error:
            raise ChildProcessError(
                f"a worker process ended (status {self._process.wait()}): out of memory? "
                "--resume goes on from here, with fewer --workers if need be"
            ) from error
        return np.split(ids, np.cumsum(sizes)[:-1])

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._to, self._from):
            try:
                pipe.close()
            except OSError:  # what it was being sent when it was killed
                continue


def serve() -> None:
    """The life of a worker process: texts in, ids out, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the parent ends this process
    tokenizer_file, how = sys.argv[1:]
    encoder = Encoder(load_tokenizer(Path(tokenizer_file)), use_tiktoken=how == "tiktoken")
    to, source = sys.stdout.buffer, sys.stdin.buffer
    while True:
        try:
            n_texts = int(_numbers(source, 1)[0])
            sizes = _numbers(source, n_texts).tolist()
            content = memoryview(_exactly(source, sum(sizes)))
        except EOFError:
            return
        starts = np.cumsum([0, *sizes]).tolist()
        try:
            result = encoder.encode(
                [str(content[a : a + n], "utf-8") for a, n in zip(starts, sizes, strict=False)]
            )
        except tuple(_ERRORS.values()) as error:
            message = str(error).encode()
            status = next(n for n, kind in _ERRORS.items() if isinstance(error, kind))
            to.write(np.array([status, 1, len(message)], np.int64).tobytes() + message)
        else:
            to.write(np.array([0, n_texts, *(i.size for i in result)], np.int64).tobytes())
            for ids in result:
                to.write(np.ascontiguousarray(ids, np.uint32).data)
        to.flush()


def _send_texts(to: IO[bytes], texts: Sequence[str]) -> None:
    parts = [text.encode() for text in texts]
    to.write(np.array([len(parts), *map(len, parts)], np.int64).tobytes())
    to.write(b"".join(parts))
    to.flush()


def _exactly(source: IO[bytes], n_bytes: int) -> bytes:
    content = source.read(n_bytes)
    if len(content) < n_bytes:
        raise EOFError
    return content


def _numbers(source: IO[bytes], count: int) -> NDArray[np.int64]:
    return np.frombuffer(_exactly(source, 8 * count), np.int64)
