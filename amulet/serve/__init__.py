"""An OpenAI-compatible server for one `Amulet`, started by `amulet serve`; see docs/serving.md.

`create_app` is in `amulet.serve.app`. Importing this package does not load the web framework.
"""
