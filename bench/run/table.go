package main

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
)

// tableVerb is short for the measures of the table.
const tableVerb = "table"

// tableMeasures are those, in order.
var tableMeasures = append([]string{"starts", "whole", "second", "load", localMeasure}, containerMeasures...)

// localMeasure is the measure of what is all here.
const localMeasure = "local"

// What is recorded beside systems.
const (
	systemBound = "B"    // what the link alone needs
	systemTOCs  = "TOCs" // of an image's layers
)

// goal is a row of the table: what a figure of ours has to be beside another.
type goal struct {
	what            string // as the table says; "" is that of the row above
	section         string // the measure that has it
	measure, link   string
	unit            string
	system, variant string // ours
	rival, rvariant string
	instead         string // the rival where the first was not there
	image           string // "" is all that there are
	want            float64
	// aside is added to want times the rival's figure before it is compared.
	aside float64
	// less is a system whose figure is taken off ours, where it was recorded.
	less string
	// absolute has want for itself; the rival's figure is told beside it.
	absolute bool
}

// Names that the measures give to what they record.
const (
	measureStart  = "cold start"
	measureWhole  = "whole image cold"
	measureSecond = "second start, page cache "
	measureLoad   = "walk and whole read"
	measureTar    = "tar cold"
	measureOpen   = "open, read, close warm"
	measureBig    = "sequential cold"
	measureRandom = "random 4 KiB cold"
	advised       = ", advised"
)

// localGoals are those of the measure local.
var localGoals = []goal{
	{what: "`tar c` of a local image of 100,000 files, page cache cold", section: localMeasure, measure: measureTar, unit: "s", system: "varve kernel", rival: "ext4", want: 0.5},
	{section: localMeasure, measure: measureTar, unit: "s", system: "varve fuse", rival: "ext4", want: 1.0},
	{what: "open, read, close of 20,000 small local files, warm", section: localMeasure, measure: measureOpen, unit: "CPU s", system: "varve kernel", rival: "ext4", want: 1.1},
	{section: localMeasure, measure: measureOpen, unit: "CPU s", system: "varve fuse", rival: "ext4", want: 1.5},
	{what: "local file of 2 GB, sequential, page cache cold", section: localMeasure, measure: measureBig, unit: "MB/s", system: "varve kernel", rival: "ext4", want: 0.8},
	{section: localMeasure, measure: measureBig, unit: "MB/s", system: "varve fuse", rival: "ext4", want: 0.6},
	{what: "random 4 KiB reads of it, cold", section: localMeasure, measure: measureRandom, unit: "IOPS", system: "varve kernel", rival: "ext4", want: 0.8},
	{section: localMeasure, measure: measureRandom, unit: "IOPS", system: "varve fuse", rival: "ext4", want: 0.8},
	{what: "the same, with the kernel told so", section: localMeasure, measure: measureRandom + advised, unit: "IOPS", system: "varve kernel", rival: "ext4", want: 0.8},
	{section: localMeasure, measure: measureRandom + advised, unit: "IOPS", system: "varve fuse", rival: "ext4", want: 0.8},
}

// startGoals are those of images that come over a link.
var startGoals = []goal{
	{what: "cold start at edge, no profile", section: "starts", measure: measureStart, link: "edge", unit: "s", system: systemOurs, variant: formOptimised, rival: systemStargz, rvariant: formOptimised, want: 1},
	{section: "starts", measure: measureStart, link: "edge", unit: "s", system: systemOurs, variant: formEStargz, rival: systemStargz, rvariant: formEStargz, want: 0.6},
	{what: "the same with a profile", section: "starts", measure: measureStart, link: "edge", unit: "s", system: systemOurs, variant: formProfile, rival: systemBound, want: 1.3, aside: 0.3},
	{section: "starts", measure: measureStart, link: "edge", unit: "MB", system: systemOurs, variant: formProfile, rival: systemBound, want: 1.15, less: systemTOCs},
	{section: "starts", measure: measureStart, link: "edge", unit: "s", system: systemOurs, variant: formConverted, rival: systemBound, image: "jdk", want: 0.7},
	{what: "cold start at datacenter with a profile", section: "starts", measure: measureStart, link: "datacenter", unit: "s", system: systemOurs, variant: formProfile, rival: systemOverlayfs, instead: systemUnpacked, rvariant: formPlain, want: 0.2},
	{section: "starts", measure: measureStart, link: "datacenter", unit: "s", system: systemOurs, variant: formProfile, rival: systemStargz, rvariant: formOptimised, want: 1},
	{what: "whole image read (`tar c` of it) cold at datacenter", section: "whole", measure: measureWhole, link: "datacenter", unit: "s", system: systemOurs, variant: formEStargz, rival: systemOverlayfs, instead: systemUnpacked, rvariant: formPlain, want: 1},
	{section: "whole", measure: measureWhole, link: "datacenter", unit: "s", system: systemOurs, variant: formIndexed, rival: systemOverlayfs, instead: systemUnpacked, rvariant: formPlain, want: 1},
	{section: "whole", measure: measureWhole, link: "datacenter", unit: "s", system: systemOurs, variant: formPlain, rival: systemOverlayfs, instead: systemUnpacked, rvariant: formPlain, want: 1},
	{what: "second start, same node, new mount, page cache as left", section: "second", measure: measureSecond + cacheLeft, unit: "s", system: systemOurs, variant: formEStargz, rival: systemOverlayfs, instead: systemUnpacked, rvariant: formPlain, want: 1.05},
	{what: "the same, page cache dropped", section: "second", measure: measureSecond + cacheDropped, unit: "s", system: systemOurs, variant: formEStargz, rival: systemOverlayfs, instead: systemUnpacked, rvariant: formPlain, want: 1.05},
}

// daemonGoals are those of the daemon itself.
var daemonGoals = []goal{
	{what: "daemon memory, large image walked and wholly read", section: "load", measure: measureLoad, unit: "MiB", system: "varve kernel", variant: formEStargz, rival: systemStargz, rvariant: formEStargz, image: loadImage, want: peakTarget, absolute: true},
	{section: "load", measure: measureLoad, unit: "MiB", system: "varve fuse", variant: formEStargz, rival: systemStargz, rvariant: formEStargz, image: loadImage, want: peakTarget, absolute: true},
	{what: "daemon CPU over a cold start", section: "starts", measure: measureStart, link: "edge", unit: "CPU s", system: systemOurs, variant: formEStargz, rival: systemStargz, rvariant: formEStargz, want: 0.5},
	{section: "starts", measure: measureStart, link: "edge", unit: "CPU s", system: systemOurs, variant: formOptimised, rival: systemStargz, rvariant: formOptimised, want: 0.5},
	{section: "starts", measure: measureStart, link: "datacenter", unit: "CPU s", system: systemOurs, variant: formProfile, rival: systemStargz, rvariant: formOptimised, want: 0.5},
}

// tableGoals are all rows.
func tableGoals() []goal { return slices.Concat(startGoals, localGoals, daemonGoals, containerGoals) }

// reached is what came of a goal on one image.
type reached struct {
	image, rival string
	got          float64 // what is compared with want
	ours, theirs float64 // medians
	ok           bool
}

// of compares the figures of a goal, image by image, in the order of the file.
func (g goal) of(r results) (out []reached) {
	for _, s := range r.Sections {
		if s.Name != g.section {
			continue
		}
		for _, f := range s.Figures {
			if !g.isOurs(f) {
				continue
			}
			theirs := Figure{Measure: g.measure, Image: f.Image, Link: g.link, System: g.rival, Variant: g.rvariant, Unit: g.unit}
			rival := s.find(theirs)
			if rival == nil && g.instead != "" {
				theirs.System = g.instead
				rival = s.find(theirs)
			}
			x := reached{image: f.Image, rival: named(theirs.System, g.rvariant), ours: median(f.Values), theirs: median(rival)}
			if g.less != "" {
				x.ours -= median(s.find(Figure{Measure: g.measure, Image: f.Image, Link: g.link, System: g.less, Unit: g.unit}))
			}
			switch bound := g.want*x.theirs + g.aside; {
			case g.absolute:
				x.got = x.ours
			case rival == nil || bound == 0:
				continue
			case g.aside != 0:
				x.got = x.ours / bound
			default:
				x.got = x.ours / x.theirs
			}
			if x.ok = x.got <= g.most(); higherIsBetter(g.unit) {
				x.ok = x.got >= g.want
			}
			out = append(out, x)
		}
	}
	return out
}

func (g goal) isOurs(f Figure) bool {
	return f.Measure == g.measure && f.Unit == g.unit && f.System == g.system && f.Variant == g.variant &&
		(g.link == "" || f.Link == g.link) && (g.image == "" || f.Image == g.image)
}

// most is what the compared figure may be: of a bound with something added, 1.
func (g goal) most() float64 {
	if g.aside != 0 {
		return 1
	}
	return g.want
}

// target says what is to reach.
func (g goal) target() string {
	switch {
	case g.absolute:
		return fmt.Sprintf("<= %g %s", g.want, g.unit)
	case g.aside != 0:
		return fmt.Sprintf("<= %g of it + %g %s", g.want, g.aside, g.unit)
	case higherIsBetter(g.unit):
		return fmt.Sprintf(">= %g", g.want)
	}
	return fmt.Sprintf("<= %g", g.want)
}

// judged sums up images.
func judged(all []reached) string {
	var missed []string
	for _, x := range all {
		if !x.ok {
			missed = append(missed, cmp.Or(x.image, "it"))
		}
	}
	switch {
	case len(all) == 0:
		return "not measured"
	case len(missed) == 0:
		return "reached"
	case len(missed) == len(all):
		return "missed"
	}
	return "missed by " + strings.Join(missed, ", ")
}

// tableTitle is the heading of the section that stands first.
const tableTitle = "The table"

// table sums up all figures there are beside the goals.
func table(r results) string {
	var out section
	out.line("What is to be reached, beside what was: the figures of each measure's latest run, whose own section below says how they were taken. *reached*: the median of ours in proportion to the rival's, in the unit of the column before, image by image; of a bound with something added, in proportion to all of it. *not measured*: ours or that rival was not there.")
	out.line("")
	out.line("| measure | ours | rival | unit | target | reached | verdict |")
	out.line("|---|---|---|---|---|---|---|")
	for _, g := range tableGoals() {
		got := g.of(r)
		said := func(x reached) string {
			ratio := fmt.Sprintf("%.2f", x.got)
			if g.absolute {
				ratio = short(x.got)
				if x.theirs > 0 {
					ratio += " (rival " + short(x.theirs) + ")"
				}
			}
			if g.section == localMeasure || g.image != "" {
				return ratio
			}
			return x.image + " " + ratio
		}
		rival := named(g.rival, g.rvariant)
		if len(got) > 0 {
			rival = got[0].rival
		}
		out.line("| %s | %s | %s | %s | %s | %s | %s |", g.what, named(g.system, g.variant), rival, g.unit, g.target(), strings.Join(pickFrom(got, said), ", "), judged(got))
	}
	out.line("")
	for _, s := range r.Sections {
		out.line("- `%s`: %s", s.Name, s.Machine)
	}
	out.line("")
	out.line("Plots: %s.", strings.Join(pickFrom(charts(r), func(c chart) string { return fmt.Sprintf("[%s](%s/%s)", c.title, plotsName, c.file) }), "; "))
	return out.String()
}

func named(system, variant string) string {
	if variant == "" {
		return system
	}
	return system + ": " + variant
}

// summed writes the table and the plots anew, of all figures that there are.
func (b *bench) summed() error {
	r, err := readResults(resultsPath(b.out))
	if err != nil {
		return err
	}
	if err := replaceSection(b.out, tableTitle, table(r)); err != nil {
		return err
	}
	if err := firstSection(b.out, tableTitle); err != nil {
		return err
	}
	return writePlots(plotsDir(b.out), r)
}

// firstSection moves a section of the results before the others.
func firstSection(path, title string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	parts := strings.Split(string(text), "\n## ")
	i := slices.IndexFunc(parts, func(p string) bool { return strings.HasPrefix(p, title+"\n") })
	if i < 1 {
		return fmt.Errorf("%s has no section %q", path, title)
	}
	part := parts[i]
	parts = slices.Insert(slices.Delete(parts, i, i+1), 1, part)
	for i := range parts {
		parts[i] = strings.TrimSpace(parts[i]) + "\n"
	}
	return os.WriteFile(path, []byte(strings.Join(parts, "\n## ")), 0o644)
}

// targets gives what a measure has to reach, by system.
func targets(measure string) map[string]float64 {
	out := map[string]float64{}
	for _, g := range tableGoals() {
		if g.measure == measure {
			out[g.system] = g.want
		}
	}
	return out
}
