-- Add samples to the histogram of an operation, and reduce the weight of old samples.
-- KEYS[1]: timing hash.
-- ARGV: samples between two reductions, factor, ttl_s, then bucket, samples, bucket, samples, ...
local key, every, since = KEYS[1], tonumber(ARGV[1]), 0
for i = 4, #ARGV, 2 do
  redis.call('HINCRBYFLOAT', key, ARGV[i], ARGV[i + 1])
  since = redis.call('HINCRBY', key, 'since', ARGV[i + 1])
end
if since >= every then
  local factor = tonumber(ARGV[2])
  local all = redis.call('HGETALL', key)
  for i = 1, #all, 2 do
    if all[i] ~= 'since' then
      redis.call('HSET', key, all[i], string.format('%.6f', tonumber(all[i + 1]) * factor))
    end
  end
  redis.call('HSET', key, 'since', 0)
end
redis.call('EXPIRE', key, ARGV[3])
