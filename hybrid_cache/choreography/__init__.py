"""Messages that are encoded once and used again in other orders (Prompt Choreography, Bai and Eisner 2025).

arrangement   what a request asks for: its parts, and how faithful the answer must be
order         the order of unordered messages that finds the longest prefix in the cache
plan          what will be reused, relocated, composed or computed, and what that costs
program       a prompt as steps: what is attached, computed and kept
compiler      from an arrangement to a plan and a program
stage         takes programs forward, between the chunks of a prompt
commands      what that asks of the device
assembly      pieces of a conversation put together to a prompt
book          the messages that were seen: ids, tokens, text

`device.effects` and `device.compose` hold the tensors of it, `hybrid_cache.workflow` is the library interface.
"""
