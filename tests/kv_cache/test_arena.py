import contextlib
import os
import socket
import subprocess
import sys

import pytest
import torch

from serve_app.kv_cache.arena import Arena, PosixShmArena
from serve_app.kv_cache.kv_pool import KvGeometry, KvPool

GEOMETRY = KvGeometry(num_blocks=8, block_size=16, n_layers=2, n_kv_heads=2, head_dim=8, dtype=torch.float32)

# The other process: attaches to the descriptor that comes over the socket, checks block 3, fills block 5, answers and
# then waits until it is ended.
PEER = """
import socket, sys, torch
from serve_app.kv_cache.arena import PosixShmArena
from serve_app.kv_cache.kv_pool import KvGeometry, KvPool
link = socket.socket(fileno=int(sys.argv[1]))
_, (fd,), _, _ = socket.recv_fds(link, 1, 1)
pool = KvPool.attach(PosixShmArena.attach(fd), KvGeometry(8, 16, 2, 2, 8, torch.float32))
assert bool((pool.k[1][3] == 3.0).all()) and bool((pool.v[0][3] == 4.0).all())
pool.k[0][5] = 7.0
link.sendall(b"done")
link.recv(1)
"""


def test_is_zeroed_and_shared_by_handle() -> None:
    arena: Arena = PosixShmArena.create(8192)
    peer = PosixShmArena.attach(arena.handle)
    assert bytes(arena.buffer()) == bytes(8192)
    peer.buffer()[100:103] = b"abc"
    assert bytes(arena.buffer()[100:103]) == b"abc"
    assert peer.num_bytes == 8192
    arena.close()
    assert bytes(peer.buffer()[100:103]) == b"abc"
    peer.close()


def test_a_readonly_attachment_cannot_write() -> None:
    arena = PosixShmArena.create(4096)
    peer = PosixShmArena.attach(arena.handle, readonly=True)
    assert peer.buffer().readonly
    peer.close()
    arena.close()


def test_nobody_can_shrink_it_under_the_others() -> None:
    arena = PosixShmArena.create(8192)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.handle, 4096)
    arena.close()


def test_closing_frees_descriptor_and_mapping_and_may_be_repeated() -> None:
    before = set(os.listdir("/proc/self/fd"))
    arena = PosixShmArena.create(4096)
    arena.close()
    arena.close()
    assert set(os.listdir("/proc/self/fd")) == before
    assert "sirocco-kv" not in _maps()


def test_a_view_outlives_close() -> None:
    arena = PosixShmArena.create(4096)
    view = torch.frombuffer(arena.buffer(), dtype=torch.uint8)
    view[0] = 9
    arena.close()
    assert int(view[0]) == 9
    del view
    assert "sirocco-kv" not in _maps()


def test_two_processes_share_a_pool_and_the_death_of_one_leaves_it_whole() -> None:
    pool, arena = _make_pool()
    pool.k[1][3] = 3.0
    pool.v[0][3] = 4.0
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", PEER, str(theirs.fileno())]
        peer = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            theirs.close()
            ours.settimeout(60)
            socket.send_fds(ours, [b"x"], [arena.handle])
            assert ours.recv(4) == b"done"
            peer.kill()
        finally:
            with contextlib.suppress(ProcessLookupError):
                peer.kill()
            peer.wait(10)
    assert bool((pool.k[0][5] == 7.0).all())
    pool.k[0][5] = 8.0
    assert float(pool.k[0].sum()) == 8.0 * pool.k[0][5].numel()
    pool.close()


def test_attaching_to_another_geometry_is_refused() -> None:
    pool, arena = _make_pool()
    peer = PosixShmArena.attach(arena.handle)
    other = KvGeometry(num_blocks=8, block_size=32, n_layers=2, n_kv_heads=1, head_dim=8, dtype=torch.float32)
    assert other.num_bytes == GEOMETRY.num_bytes
    with pytest.raises(ValueError, match="does not hold a KV pool"):
        KvPool.attach(peer, other)
    peer.close()
    pool.close()


def _make_pool() -> tuple[KvPool, PosixShmArena]:
    arenas: list[PosixShmArena] = []

    def factory(num_bytes: int) -> PosixShmArena:
        arenas.append(PosixShmArena.create(num_bytes))
        return arenas[0]

    pool = KvPool.create(factory, 8, 16, 2, 2, 8, torch.float32)
    return pool, arenas[0]


def _maps() -> str:
    with open("/proc/self/maps") as maps:
        return maps.read()
