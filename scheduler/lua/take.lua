-- uses: clock
-- Take free slots that serve a queue, so that k free slots cause k children.
-- KEYS[1]: slots (HASH).  ARGV: queue, at most, ttl_ms.
-- Returns {number of slots taken, number of slots that serve the queue}.
local now = now_ms()
local most, taken, total = tonumber(ARGV[2]), 0, 0
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  -- The entry of another release, or a damaged one, hides no other.
  local read, worker = pcall(cjson.decode, all[i + 1])
  if not read or type(worker) ~= 'table' or not (worker.at and worker.queues and worker.free) then
    worker = {at = now, queues = {}}
  end
  if now - worker.at > tonumber(ARGV[3]) then
    redis.call('HDEL', KEYS[1], all[i])
  else
    for _, queue in ipairs(worker.queues) do
      if queue == ARGV[1] then
        total = total + worker.total
        local got = math.min(worker.free, most - taken)
        if got > 0 then
          taken, worker.free = taken + got, worker.free - got
          redis.call('HSET', KEYS[1], all[i], cjson.encode(worker))
        end
      end
    end
  end
end
return {taken, total}
