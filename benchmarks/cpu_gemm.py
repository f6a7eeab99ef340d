"""GEMMs of quantized Linears on this CPU, against those of peers.

    python benchmarks/cpu_gemm.py [--scheme NAME ...] [--csv FILE] [--json FILE] [--plot FILE] ...

The same as ``quark-inductor bench``, whose ``--help`` lists the options. Peers are measured where they are installed:
``pip install torchao openvino llama-cpp-python`` (the last one compiles llama.cpp for this CPU, which takes a while).
"""

import sys

from quark_inductor.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
