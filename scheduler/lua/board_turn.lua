-- uses: clock
-- Elect the worker that measures the platform.  KEYS[1]: turn.
-- ARGV: worker, ms for which no other is elected.   Returns now in ms to the elected, else 0.
if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 0 end
return now_ms()
