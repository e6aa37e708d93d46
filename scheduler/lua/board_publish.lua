-- uses: clock
-- Publish one host's report.  KEYS[1]: hosts (HASH).  ARGV: worker, report, ms to keep.   Returns 1.
local now = now_ms()
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f %s', now, ARGV[2]))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
