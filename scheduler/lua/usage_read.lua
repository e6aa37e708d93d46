-- Return an operation's counts: {done, failed, busy_us, nodes, memory_kb, peak_kb}.
-- KEYS[1]: its counts (HASH).
local counts = redis.call('HMGET', KEYS[1],
  'done', 'failed', 'busy_us', 'nodes', 'memory_kb', 'peak_kb')
for i = 1, 6 do counts[i] = counts[i] or '0' end
return counts
