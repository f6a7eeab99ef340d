"""Graph to graph: the rules that find quantized mathematics in an FX graph and put fused ops in its place."""

if __name__ != "quark_inductor.patterns":
    raise ImportError("import quark_inductor.patterns, not patterns: two copies would register every op twice")
