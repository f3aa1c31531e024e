package fetch

import (
	"fmt"
	"strings"
	"time"
)

// Hours is a part of every day, by the local clock. The zero value is all of it.
type Hours struct{ From, To time.Duration } // since midnight

// ParseHours reads "22:00-06:00"; "" is all of the day.
func ParseHours(s string) (h Hours, err error) {
	if s == "" {
		return h, nil
	}
	from, to, ok := strings.Cut(s, "-")
	if ok {
		if h.From, ok = clock(from); ok {
			h.To, ok = clock(to)
		}
	}
	if h.From == 24*time.Hour {
		h.From = 0
	}
	if !ok || h.From == h.To {
		return Hours{}, fmt.Errorf("hours %q: want two times of the day, such as 22:00-06:00", s)
	}
	return h, nil
}

func clock(s string) (time.Duration, bool) {
	s = strings.TrimSpace(s)
	if s == "24:00" {
		return 24 * time.Hour, true
	}
	t, err := time.Parse("15:04", s)
	return time.Duration(t.Hour())*time.Hour + time.Duration(t.Minute())*time.Minute, err == nil
}

// Contain reports whether a moment lies in the hours, which may pass midnight.
func (h Hours) Contain(t time.Time) bool {
	if h == (Hours{}) {
		return true
	}
	at := time.Duration(t.Hour())*time.Hour + time.Duration(t.Minute())*time.Minute + time.Duration(t.Second())*time.Second
	if h.From < h.To {
		return at >= h.From && at < h.To
	}
	return at >= h.From || at < h.To
}
