package main

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"text/tabwriter"
)

// compareVerb sets two files of figures side by side.
const compareVerb = "compare"

// fewRuns is the number of values below which nothing is said of their spread.
const fewRuns = 3

// compared is a figure of two files.
type compared struct {
	section  string
	f        Figure // what it is; its values are the new ones
	old, new []float64
}

func compareFiles(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("%s OLD.json NEW.json: two files of figures, such as bench/results.json of two commits", compareVerb)
	}
	old, err := readResults(args[0])
	if err != nil {
		return err
	}
	new, err := readResults(args[1])
	if err != nil {
		return err
	}
	return compareTo(os.Stdout, args, old, new)
}

// compareTo writes the table. Names are those of the files.
func compareTo(w io.Writer, names []string, old, new results) error {
	both, gone, added := match(old, new)
	if len(both) == 0 {
		return fmt.Errorf("%s (%d figures) and %s (%d) have no figure in common", names[0], gone, names[1], added)
	}
	fmt.Fprintf(w, "Medians. A figure is better or worse where the medians differ by more than the two\ninterquartile ranges together, and by more than 1 %%; \"few\": fewer than %d runs in one of\nthe files, so that nothing is known of the noise. Rivals are here too: what they did not\ngain or lose, the machine did not.\n\n", fewRuns)
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "measure\timage\tlink\tsystem\tunit\told\tnew\tnew/old\t")
	for _, c := range both {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", c.f.Measure, c.f.Image, c.f.Link, named(c.f.System, c.f.Variant), c.f.Unit,
			short(median(c.old)), short(median(c.new)), c.ratio(), after(c.judge()))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	counts := map[string]int{}
	for _, c := range both {
		counts[c.judge()]++
	}
	_, err := fmt.Fprintf(w, "\n%d figures: %d better, %d worse, %d within the noise, %d of too few runs. Only in %s: %d. Only in %s: %d.\n",
		len(both), counts["better"], counts["worse"], counts[""], counts["few"], names[0], gone, names[1], added)
	return err
}

// after is a word at the end of a line.
func after(word string) string {
	if word == "" {
		return ""
	}
	return "  " + word
}

// match pairs the figures of two files, in the order of the old one, and counts
// those that only one has.
func match(old, new results) (both []compared, gone, added int) {
	theirs := map[string][]float64{}
	for _, s := range new.Sections {
		for _, f := range s.Figures {
			theirs[s.Name+"\x00"+f.key()] = f.Values
			added++
		}
	}
	for _, s := range old.Sections {
		for _, f := range s.Figures {
			k := s.Name + "\x00" + f.key()
			v, ok := theirs[k]
			if !ok {
				gone++
				continue
			}
			delete(theirs, k)
			added--
			both = append(both, compared{s.Name, f, f.Values, v})
		}
	}
	return both, gone, added
}

func (c compared) ratio() string {
	if median(c.old) == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", median(c.new)/median(c.old))
}

// judge says whether the new median is better or worse than the old one by more
// than the runs of either differ among themselves.
func (c compared) judge() string {
	if min(len(c.old), len(c.new)) < fewRuns {
		return "few"
	}
	was, is := median(c.old), median(c.new)
	by := math.Abs(is - was)
	if by <= spread(c.old)+spread(c.new) || by <= 0.01*math.Abs(was) {
		return ""
	}
	if (is > was) == higherIsBetter(c.f.Unit) {
		return "better"
	}
	return "worse"
}

// spread is the interquartile range: one odd run in five is not in it.
func spread(v []float64) float64 {
	s := slices.SortedFunc(slices.Values(v), cmp.Compare[float64])
	at := func(q float64) float64 {
		x := q * float64(len(s)-1)
		i := int(x)
		if i+1 == len(s) {
			return s[i]
		}
		return s[i] + (x-float64(i))*(s[i+1]-s[i])
	}
	return at(0.75) - at(0.25)
}
