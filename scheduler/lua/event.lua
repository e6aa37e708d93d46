-- Add events to the stream, stamped with the server's time; the oldest go.
-- KEYS[1]: stream.  ARGV: how many are kept, then each event as JSON.
local t = redis.call('TIME')
local at = t[1] .. '.' .. string.format('%06d', tonumber(t[2]))
for i = 2, #ARGV do
  redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[1], '*', 'event', ARGV[i], 'at', at)
end
