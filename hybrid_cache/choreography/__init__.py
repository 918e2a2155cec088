"""Messages that are encoded once and used again in other orders (Prompt Choreography, Bai and Eisner 2025).

arrangement   what a request asks for: its parts, and how faithful the answer must be
plan          what will be reused, relocated, composed or encoded again, and what that costs
effects       what a run of tokens does to each recurrent state: h -> P h + S
compose       effects of several messages put together
stage         carries plans out on the cache
assembly      pieces of a conversation put together to a prompt
book          the messages that were seen: ids, tokens, text
workflow      all of it for who imports this package
"""
