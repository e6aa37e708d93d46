-- Add one call to the sums of its kinds; after some number of calls all sums of a kind are halved.
-- KEYS: a HASH of sums for each kind, the widest first.
-- ARGV: the number of calls after which sums are halved, seconds to keep them, seconds to keep the
-- narrowest ones for each of their calls, then name, amount, name, amount ...; the first name is
-- `calls`.
for number, key in ipairs(KEYS) do
  for i = 4, #ARGV, 2 do redis.call('HINCRBYFLOAT', key, ARGV[i], ARGV[i + 1]) end
  local calls = tonumber(redis.call('HGET', key, 'calls'))
  if calls >= tonumber(ARGV[1]) then
    local all = redis.call('HGETALL', key)
    for i = 1, #all, 2 do
      redis.call('HSET', key, all[i], string.format('%.17g', tonumber(all[i + 1]) / 2))
    end
  end
  local keep_s = tonumber(ARGV[2])
  if number == #KEYS then keep_s = math.min(keep_s, math.ceil(calls * tonumber(ARGV[3]))) end
  redis.call('EXPIRE', key, math.max(1, keep_s))
end
