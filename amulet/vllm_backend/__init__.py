"""Steers requests in vLLM's engine and OpenAI server, through vLLM's own plug-in points.

`frontend` builds a request's prompts, `scheduler` keeps the rows of a request together, and
`processor` combines them and chooses one token. `wire` is the data that these three exchange.
"""
