"""Other systems, measured beside ours: each in its own environment, as a process that answers the same token ids.

A peer is one line in `registry.PEERS`. `environments` sets up what it runs in, `weights` gives it the model that is
measured, `client` talks to it. The files `worker*.py` are the other end of that talk: they run under the peer's own
Python and import nothing of chunkcache. `builds` measures another build of chunkcache likewise; of that, its worker
imports what a user does.
"""

from __future__ import annotations

from chunkcache.eval.peers.builds import BUILD, Build, build_name
from chunkcache.eval.peers.client import Peer, PeerAnswer, parts
from chunkcache.eval.peers.environments import SetUp, setup_peers
from chunkcache.eval.peers.registry import PEERS
from chunkcache.eval.peers.weights import model_folder, peer_weights

__all__ = [
    "BUILD",
    "PEERS",
    "Build",
    "Peer",
    "PeerAnswer",
    "SetUp",
    "build_name",
    "model_folder",
    "parts",
    "peer_weights",
    "setup_peers",
]
