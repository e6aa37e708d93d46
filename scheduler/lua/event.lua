-- uses: clock
-- Add events to the stream with the server's time; the oldest are removed.
-- KEYS[1]: stream.  ARGV: number of events to keep, then each event as JSON.
local at = in_seconds(now_us())
for i = 2, #ARGV do
  redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[1], '*', 'event', ARGV[i], 'at', at)
end
