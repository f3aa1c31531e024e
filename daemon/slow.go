package daemon

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/docker/go-units"
	"golang.org/x/time/rate"
)

// leastRate is the smallest limit that can be asked for: a slower transfer would
// look to all on its way like one that has stalled.
const leastRate = 1000

// ParseRate reads bytes a second, such as 2MB, 500k or 1MiB; "" and 0 are no limit.
func ParseRate(s string) (int64, error) {
	parse := units.FromHumanSize
	if strings.Contains(strings.ToLower(s), "i") {
		parse = units.RAMInBytes
	}
	if s == "" {
		return 0, nil
	}
	n, err := parse(strings.TrimSuffix(s, "/s"))
	if err != nil {
		return 0, fmt.Errorf("%q: want bytes a second, such as 2MB", s)
	}
	return n, checkRate(n)
}

func checkRate(n int64) error {
	if n < 0 || n > 0 && n < leastRate {
		return fmt.Errorf("%d bytes a second: want at least %d, or 0 for no limit", n, leastRate)
	}
	return nil
}

// newLimit lets so many bytes a second through; nil for 0, which is no limit.
func newLimit(bytesPerSecond int64) *rate.Limiter {
	if bytesPerSecond == 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(bytesPerSecond), int(min(max(bytesPerSecond/8, 4<<10), 1<<20)))
}

// slow is a transport whose answers come no faster than a limit allows.
type slow struct {
	http.RoundTripper
	limit *rate.Limiter
}

func (s slow) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := s.RoundTripper.RoundTrip(req)
	if err == nil {
		resp.Body = &slowBody{resp.Body, req.Context(), s.limit}
	}
	return resp, err
}

type slowBody struct {
	io.ReadCloser
	ctx   context.Context // of the request
	limit *rate.Limiter
}

// Read waits after the bytes, not before them: how many come is not known earlier.
func (b *slowBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p[:min(len(p), b.limit.Burst())])
	if werr := b.limit.WaitN(b.ctx, n); werr != nil && err == nil {
		err = werr
	}
	return n, err
}
