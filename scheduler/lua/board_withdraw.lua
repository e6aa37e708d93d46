-- uses: clock
-- Remember that a worker was stopped.  KEYS[1]: hosts (HASH).  ARGV: worker.   Returns 1.
local entry = redis.call('HGET', KEYS[1], ARGV[1])
local report = entry and string.match(entry, '^%-?%d+ (.*)$')
if report then
  redis.call('HSET', KEYS[1], ARGV[1], string.format('-%.0f %s', now_ms(), report))
end
return 1
