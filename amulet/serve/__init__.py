"""An OpenAI-compatible server over one `Amulet`; `amulet serve` starts it, docs/serving.md tells.

`create_app` is in `amulet.serve.app`; importing this package alone needs no web framework.
"""
