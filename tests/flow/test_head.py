"""A head that goes away and comes back, as a socket that does."""

import socket
import threading
from contextlib import closing

from dpo_ray.flow import head


def listen(port: int = 0) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def test_head_that_goes_away_is_spoken_of_once_and_again_when_it_is_back() -> None:
    first = listen()
    port = first.getsockname()[1]
    said: list[str] = []
    told = threading.Semaphore(0)

    def say(text: str) -> None:
        said.append(text)
        told.release()

    with head.watch(say, f"127.0.0.1:{port}", look_s=0.02, gone_s=0.1):
        first.close()
        assert told.acquire(timeout=10)
        with closing(listen(port)):
            assert told.acquire(timeout=10)
    assert "has not answered" in said[0]
    assert "the same command goes on from there" in said[0]
    assert said[1:] == [f"the head of the cluster (127.0.0.1:{port}) answers again"]


def test_head_that_answers_is_not_spoken_of() -> None:
    said: list[str] = []
    asked = threading.Semaphore(0)
    with closing(listen()) as there, head.watch(said.append, f"127.0.0.1:{there.getsockname()[1]}", look_s=0.02, gone_s=0.01):

        def accept() -> None:
            while True:
                there.accept()[0].close()
                asked.release()

        threading.Thread(target=accept, daemon=True).start()
        for _ in range(5):
            assert asked.acquire(timeout=10)
    assert said == []
