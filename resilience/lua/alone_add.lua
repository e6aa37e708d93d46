-- uses: clock
-- Add decisions that guards made without Redis.  KEYS: counts.  ARGV: kind, number, ...
for i = 1, #ARGV, 2 do redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'at', now_ms())
redis.call('EXPIRE', KEYS[1], 86400)
return 0
