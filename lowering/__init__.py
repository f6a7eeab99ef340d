"""Fused op to kernel: the providers, what each can run, and the target they run on."""

if __name__ != "quark_inductor.lowering":
    raise ImportError("import quark_inductor.lowering, not lowering: two copies would register every op twice")
