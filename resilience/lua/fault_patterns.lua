-- uses: clock
-- Read the recurring faults at the server's time, which tells whose window is over.
-- KEYS[1]: patterns hash.  Returns {now in ms, {field, value, ...}}.
return {now_ms(), redis.call('HGETALL', KEYS[1])}
