"""What ``quark-inductor bench`` measures: this package's kernels and others that compute the same product.

Every peer runs in a process of its own (``host.py``): thread pools do not meet, and one that crashes takes nobody
along. Importing this package imports neither torch nor any peer.
"""

from quark_inductor.peers.base import Peer
from quark_inductor.peers.floats import InductorBf16, LinearBf16
from quark_inductor.peers.ggml import GgmlMxfp4, GgmlNvfp4, GgmlQ8
from quark_inductor.peers.openvino import OpenVinoInt8, OpenVinoMxfp4
from quark_inductor.peers.ours import Emulation, Quark
from quark_inductor.peers.torchao import TorchaoInt4, TorchaoInt8

OURS: type[Peer] = Quark
PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        LinearBf16,
        InductorBf16,
        TorchaoInt8,
        TorchaoInt4,
        Emulation,
        GgmlMxfp4,
        GgmlNvfp4,
        GgmlQ8,
        OpenVinoMxfp4,
        OpenVinoInt8,
    )
}
