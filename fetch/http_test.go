package fetch

import (
	"errors"
	"fmt"
	"math"
	"net/http"
	"testing"
	"time"
)

func TestCheckContentRange(t *testing.T) {
	for _, test := range []struct {
		h            string
		off, n, size int64
		ok           bool
	}{
		{"bytes 0-9/100", 0, 10, 100, true},
		{"bytes 0-9/*", 0, 10, 100, true},
		{"bytes 0-0/1", 0, 1, 1, true},
		{"bytes 90-99/100", 90, 10, 100, true},
		{"bytes 0-4/100", 0, 10, 100, true}, // shorter: the rest is asked for again
		{"bytes 9223372036854775806-9223372036854775806/9223372036854775807", math.MaxInt64 - 1, 1, math.MaxInt64, true},
		{"", 0, 10, 100, false},
		{"bytes", 0, 10, 100, false},
		{"bytes ", 0, 10, 100, false},
		{"bytes */100", 0, 10, 100, false},
		{"0-9/100", 0, 10, 100, false},
		{"bytes=0-9/100", 0, 10, 100, false},
		{"items 0-9/100", 0, 10, 100, false},
		{"bytes 0-9", 0, 10, 100, false},
		{"bytes 0-9/", 0, 10, 100, false},
		{"bytes 0/100", 0, 10, 100, false},
		{"bytes -9/100", 0, 10, 100, false},
		{"bytes 0-/100", 0, 10, 100, false},
		{"bytes 1-9/100", 0, 10, 100, false},
		{"bytes 1-10/100", 0, 10, 100, false},
		{"bytes 0-10/100", 0, 10, 100, false},
		{"bytes 5-4/100", 5, 10, 100, false},
		{"bytes 0-9/99", 0, 10, 100, false},
		{"bytes 0-9/101", 0, 10, 100, false},
		{"bytes 0-9/-1", 0, 10, 100, false},
		{"bytes 0-9/100/100", 0, 10, 100, false},
		{"bytes 0-9-9/100", 0, 10, 100, false},
		{"bytes 0-9,20-29/100", 0, 10, 100, false},
		{"bytes 0x0-9/100", 0, 10, 100, false},
		{"bytes 0-99999999999999999999/100", 0, 10, 100, false},
		{"bytes  0-9/100", 0, 10, 100, false},
		{"bytes 0-9/100 ", 0, 10, 100, false},
	} {
		err := checkContentRange(test.h, test.off, test.n, test.size)
		if (err == nil) != test.ok || err != nil && !errors.Is(err, errAnswer) {
			t.Errorf("%q for %d bytes at %d of %d: %v", test.h, test.n, test.off, test.size, err)
		}
	}
}

func FuzzContentRange(f *testing.F) {
	for _, h := range []string{"bytes 0-9/100", "bytes 0-9/*", "bytes */100", "bytes -1-9/100", "bytes 0-9,20-29/100", "bytes +0-9/100", ""} {
		f.Add(h, int64(0), int64(10), int64(100))
	}
	f.Fuzz(func(t *testing.T, h string, off, n, size int64) {
		if off < 0 || n <= 0 || size <= 0 || off > size-n {
			return
		}
		if checkContentRange(h, off, n, size) != nil {
			return
		}
		// What is accepted says that it begins where it was asked to, and is
		// within what was asked.
		var a, b int64
		if _, err := fmt.Sscanf(h, "bytes %d-%d/", &a, &b); err != nil || a != off || b < a || b >= off+n {
			t.Errorf("%q was accepted for %d bytes at %d of %d", h, n, off, size)
		}
	})
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2025, 6, 1, 12, 0, 0, 0, time.UTC)
	for h, want := range map[string]time.Duration{
		"":                                    0,
		"0":                                   0,
		"1":                                   time.Second,
		"90":                                  90 * time.Second,
		"120":                                 2 * time.Minute,
		"121":                                 2 * time.Minute,
		"9223372036854775807":                 2 * time.Minute,
		"99999999999999999999999":             0,
		"-1":                                  0,
		"-9223372036854775808":                0,
		"1.5":                                 0,
		"soon":                                0,
		now.Format(http.TimeFormat):           0,
		"Sun, 01 Jun 2025 12:00:30 GMT":       30 * time.Second,
		"Sunday, 01-Jun-25 12:00:30 GMT":      30 * time.Second,
		"Sun Jun  1 12:00:30 2025":            30 * time.Second,
		"Sun, 01 Jun 2025 11:00:00 GMT":       0,
		"Mon, 01 Jun 2026 12:00:00 GMT":       2 * time.Minute,
		"Mon, 01 Jan 0001 00:00:00 GMT":       0,
		"Fri, 31 Dec 9999 23:59:59 GMT":       2 * time.Minute,
		"Sun, 01 Jun 2025 12:00:30 GMT trail": 0,
	} {
		if got := retryAfter(h, now); got != want {
			t.Errorf("%q is %v, want %v", h, got, want)
		}
	}
}

func FuzzRetryAfter(f *testing.F) {
	for _, h := range []string{"", "1", "-1", "99999999999999", "Sun, 01 Jun 2025 12:00:30 GMT", "Fri, 31 Dec 9999 23:59:59 GMT"} {
		f.Add(h)
	}
	now := time.Date(2025, 6, 1, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, h string) {
		if d := retryAfter(h, now); d < 0 || d > 2*time.Minute {
			t.Errorf("%q is %v", h, d)
		}
	})
}

func TestTemporary(t *testing.T) {
	for code, want := range map[int]bool{
		200: false, 204: false, 400: false, 401: false, 403: false, 404: false, 408: true, 410: false, 416: false, 429: true,
		500: true, 502: true, 503: true, 504: true,
	} {
		err := fmt.Errorf("read: %w", &StatusError{Code: code})
		if got := temporary(err); got != want {
			t.Errorf("%d is temporary: %v", code, got)
		}
	}
	if !temporary(errors.New("connection reset")) || temporary(fmt.Errorf("host: %w", errAnswer)) {
		t.Error("what is no answer is temporary, and a wrong one is not")
	}
}
