package link

import (
	"testing"
	"time"
)

func TestParseProfile(t *testing.T) {
	for in, want := range map[string]Profile{
		"edge":                  {Name: "edge", RTT: 50 * time.Millisecond, Rate: 6_250_000},
		"datacenter":            {Name: "datacenter", RTT: time.Millisecond, Rate: 125_000_000},
		"none":                  {Name: "none"},
		"rtt=20ms,rate=100mbit": {RTT: 20 * time.Millisecond, Rate: 12_500_000},
		"rate=1gbit":            {Rate: 125_000_000},
		"rate=4096":             {Rate: 4096},
		"rtt=3s":                {RTT: 3 * time.Second},
	} {
		got, err := ParseProfile(in)
		if err != nil {
			t.Errorf("%q: %v", in, err)
			continue
		}
		if want.Name == "" {
			want.Name = in
		}
		if got != want {
			t.Errorf("%q = %+v, want %+v", in, got, want)
		}
	}
	for _, in := range []string{"", "fast", "rtt=", "rtt=-1s", "rate=0", "rate=-5mbit", "rate=NaN", "rate=1e40gbit", "rtt=1s,", "rate=5tbit"} {
		if p, err := ParseProfile(in); err == nil {
			t.Errorf("%q gave %+v, want an error", in, p)
		}
	}
}
