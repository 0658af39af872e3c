"""The vLLM engine: sessions over vLLM, in this process, in a process of its own, or on a server."""
