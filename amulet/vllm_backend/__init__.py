"""vLLM's engine and OpenAI server with a preference per request, through vLLM's own plug-in points.

`frontend` makes a request's prompts, `scheduler` has the rows of one request live and die as one,
`processor` combines them and has them sample one token. `wire` is what travels between the three.
"""
