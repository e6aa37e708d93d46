-- uses: clock
-- Spend from a retry budget.  KEYS[1]: budget hash.
-- ARGV: first attempts since the last call, share that each of them deposits, retries a second that
-- are always allowed, largest balance, cost.
-- Returns {1 when the cost was spent, balance as text}.
local now = now_us() / 1000000
local v = redis.call('HMGET', KEYS[1], 'balance', 'at')
local floor, most, cost = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local balance = tonumber(v[1] or 10 * floor) + math.max(0, now - tonumber(v[2] or now)) * floor
balance = math.min(most, balance + tonumber(ARGV[1]) * tonumber(ARGV[2]))
local spent = balance >= cost
if spent then balance = balance - cost end
redis.call('HSET', KEYS[1], 'balance', string.format('%.17g', balance),
           'at', string.format('%.17g', now))
redis.call('EXPIRE', KEYS[1], 3600)
return {spent and 1 or 0, tostring(balance)}
