-- uses: clock
-- Take the turn to look.  KEYS[1]: turn.  ARGV: worker, ms for which nobody else gets it.   Returns now in ms, or 0.
if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 0 end
return now_ms()
