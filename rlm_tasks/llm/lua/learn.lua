-- Add one call to the sums of a model; after some number of calls all sums are halved.
-- KEYS[1]: HASH of sums.  ARGV: the number of calls after which sums are halved, ttl_s, then
-- name, amount, name, amount ...; the first name is `calls`.
local key = KEYS[1]
for i = 3, #ARGV, 2 do redis.call('HINCRBYFLOAT', key, ARGV[i], ARGV[i + 1]) end
if tonumber(redis.call('HGET', key, 'calls')) >= tonumber(ARGV[1]) then
  local all = redis.call('HGETALL', key)
  for i = 1, #all, 2 do redis.call('HSET', key, all[i], string.format('%.17g', tonumber(all[i + 1]) / 2)) end
end
redis.call('EXPIRE', key, ARGV[2])
