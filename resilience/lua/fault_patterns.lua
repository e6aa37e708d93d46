-- uses: clock
-- Read the recurring faults and the server's time, which shows the windows that are over.
-- KEYS[1]: patterns (HASH).  Returns {now in ms, {field, value, ...}}.
return {now_ms(), redis.call('HGETALL', KEYS[1])}
