// Numbers in plain words.
import type { Calibration, Decided, Decision, Drift, Job } from './api';

export const DECIDED: Decided[] = ['accept', 'warn', 'reject'];
export const NAMES: Record<Decided, string> = { accept: 'Accept', warn: 'Warning', reject: 'Reject' };

export const count = (number: number, one: string, many = `${one}s`) => `${number.toLocaleString('en')} ${number === 1 ? one : many}`;
export const percent = (share: number) => `${Number((100 * share).toPrecision(2))}\u00a0%`;
export const number = (value: number, digits = 2) => value.toFixed(digits);

/** A score, with as many digits as it takes to see on which side of a limit it lies. */
export function scored(score: number, limits: { warn_limit: number | null; reject_limit: number }): string {
  const near = [limits.reject_limit, limits.warn_limit ?? limits.reject_limit].filter((limit) => limit !== score);
  for (let digits = 2; digits < 6; digits++) if (near.every((limit) => limit.toFixed(digits) !== score.toFixed(digits))) return score.toFixed(digits);
  return String(score);
}

/** How many good parts look at least as unusual; of those held out, none may. */
export function chance(p: number, score: number, held: number[] = []): string {
  if (held.length && held.every((other) => other < score)) {
    const most = p >= 0.0095 ? `of 100 good parts, at most about ${Math.round(100 * p)}` : `of 1000 good parts, at most about ${Math.max(1, Math.round(1000 * p))}`;
    return `None of the ${held.length} held-out good parts looks as unusual; ${most} would.`;
  }
  if (p > 0.9) return 'Nearly all good parts look at least as unusual.';
  if (p >= 0.0095) {
    const parts = Math.round(100 * p);
    return `Of 100 good parts, about ${parts} ${parts === 1 ? 'looks' : 'look'} at least as unusual.`;
  }
  const parts = Math.max(1, Math.round(1000 * p));
  return `Of 1000 good parts, about ${parts} ${parts === 1 ? 'looks' : 'look'} at least as unusual.`;
}

/** Why it was decided so. */
export function reason(found: Decision): string {
  const score = scored(found.score, found);
  if (found.decision === 'reject') return `Its score ${score} is above the reject limit ${number(found.reject_limit)}.`;
  if (found.decision === 'warn')
    return `Its score ${score} is above the warning limit ${number(found.warn_limit!)}, but not above the reject limit ${number(found.reject_limit)}.`;
  return `Its score ${score} is not above the ${found.warn_limit === null ? 'reject' : 'warning'} limit ${number(found.warn_limit ?? found.reject_limit)}.`;
}

/** What a calibration promises. */
export function promised(found: Calibration): string {
  if (found.method === 'copies')
    return 'No promise can be made: there were too few good parts to keep some back. Add good parts, and calibrate again.';
  const rate = percent(found.promised_rate);
  const held = `${count(found.images, 'good part')} ${found.images === 1 ? 'was' : 'were'} held out`;
  const said =
    found.method === 'conformal'
      ? `${held}; a new good part is rejected with a probability of at most ${rate}.`
      : `${held}, each by turns; a new good part is rejected with a probability of about ${rate}. This is an estimate, not a guarantee.`;
  if (found.promised_rate <= found.false_reject_rate * (1 + 1e-9)) return said;
  return `${said} For the ${percent(found.false_reject_rate)} asked for, ${found.needed} held-out good parts are needed.`;
}

const LOST = 'No promise: the reject limit is below 1.';

/** What a version promises. */
export const promiseOf = (found: Calibration, limit: number) => (limit < 1 ? LOST : promised(found));

export const TESTS: Record<string, string> = { score: 'Scores', brightness: 'Brightness', sharpness: 'Sharpness' };

/** What a drift test has seen. */
export function drifted(name: string, test: Drift): string {
  const what = (TESTS[name] ?? name).toLowerCase();
  if (test.alarm) {
    const consequence =
      name === 'score'
        ? 'The promise about false rejects is suspended until a version is made with newer good parts and activated.'
        : 'Look at lamp, lens and camera. The promise still holds as long as the scores give no alarm.';
    const verb = name === 'score' ? 'have' : 'has';
    return `Alarm: ${what} of accepted parts ${verb} become ${test.direction === 'up' ? 'higher' : 'lower'}. ${consequence}`;
  }
  if (test.learning > 0) return `Still learning what is usual: ${count(test.learning, 'more accepted part')} needed.`;
  return `No change seen in ${count(test.parts, 'accepted part')}.`;
}

const FINDINGS: [RegExp, string][] = [
  [/cannot be read/, 'cannot be read'],
  [/another one of the same/, 'are, pixel for pixel, copies of another one; a copy teaches nothing'],
  [/anomalous images in the training/, 'lie in a folder whose name says that they are not good'],
];

/** What was found in a folder of good parts. */
export function finding(text: string, files: number): string {
  const known = FINDINGS.find(([pattern]) => pattern.test(text))?.[1];
  return known ? `${count(files, 'picture')} ${known}.` : `${files ? `${files} ` : ''}${text}.`;
}

const STAGES: [RegExp, string][] = [
  [/reading/, 'Reading the pictures'],
  [/turned/, 'Trying whether turned copies help'],
  [/features of synth/, 'Describing made-up defects'],
  [/synth/, 'Drawing made-up defects'],
  [/features|latents/, 'Describing the good parts'],
  [/neighbours/, 'Comparing good parts with each other'],
  [/denoiser|training/, 'Learning what good parts look like'],
  [/residual/, 'Measuring usual differences'],
  [/decoder/, 'Learning to draw good parts'],
  [/calibration/, 'Setting the limit with held-out good parts'],
  [/inspecting/, 'Inspecting'],
];

/** A stage of a training in plain words, and which of the sizes that the parts are looked at in. */
export function stage(name: string): string {
  const scale = /scale (\d+): /.exec(name)?.[1];
  const what = STAGES.find(([pattern]) => pattern.test(name))?.[1] ?? name;
  return scale ? `${what}, ${scale === '1' ? 'details' : `at 1/${2 ** (Number(scale) - 1)} of the size`}` : what;
}

const EXAMPLES: [RegExp, string][] = [
  [/^good-part-and-drawing/, 'A good part, and how well it is drawn by now'],
  [/^input-and-reconstruction/, 'A defect made up for learning, and the part as it should be'],
];

/** What an example picture of a training shows. */
export const example = (name: string) => EXAMPLES.find(([pattern]) => pattern.test(name))?.[1] ?? name.replaceAll('-', ' ');

/** The note of a version without the number of the job that made it. */
export const noteOf = (note: string) => note.replace(/(; )?\w+ by job [0-9a-f]{32}$/, '');

const USUAL_STEPS = 500; // of a training of lite

/** What is to be known of a training that had little time; empty where it had enough. */
export function hurried(job: Job): string {
  const minutes = (job.request.settings as Record<string, number> | undefined)?.['training.minutes'];
  const steps = job.progress?.losses['scale 1: denoiser']?.at(-1)?.[0];
  if (!minutes || !steps || steps >= USUAL_STEPS / 2) return '';
  return `In ${count(minutes, 'minute')} there was time for ${count(steps, 'step')} only; ${USUAL_STEPS} are usual. Defects may be passed: let it learn longer, or on a faster machine.`;
}

export const KINDS: Record<string, string> = {
  fit: 'Learn a product',
  calibrate: 'Set limits anew',
  evaluate: 'Measure on labelled pictures',
  feedback: 'Learn from verdicts',
  inspect: 'Inspect a folder',
};
export const STATES: Record<Job['state'], string> = {
  waiting: 'Waiting',
  running: 'Running',
  done: 'Done',
  failed: 'Failed',
  cancelled: 'Cancelled',
};

/** Seconds in words. */
export function span(seconds: number): string {
  if (seconds < 60) return `about ${Math.max(5, 5 * Math.round(seconds / 5))} s`;
  if (seconds < 5400) return `about ${count(Math.round(seconds / 60), 'minute')}`;
  return `about ${(seconds / 3600).toFixed(1)} hours`;
}

/** A time of the record, which is in UTC, as this place's clocks show it. */
export const when = (time: string) =>
  new Date(time).toLocaleString('en-GB', { year: 'numeric', month: 'short', day: '2-digit', hour: '2-digit', minute: '2-digit', second: '2-digit' });

export const SOURCES: Record<string, string> = { rest: 'sent over HTTP', job: 'folder of images', watch: 'watched folder' };
