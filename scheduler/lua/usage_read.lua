-- KEYS[1]: an operation's counts (HASH).   Returns {done, failed, busy_us, nodes, memory_kb, peak_kb}.
local found = redis.call('HMGET', KEYS[1], 'done', 'failed', 'busy_us', 'nodes', 'memory_kb', 'peak_kb')
for i = 1, 6 do found[i] = found[i] or '0' end
return found
